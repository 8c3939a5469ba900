/* Preloaded into a process (glibc): how often memory is allocated, on any thread, and the most bytes that were held, since
   allocations_reset(), beyond what was held then. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long calls, bytes, held, peak;

static void *given(void *p) {
    const long size = p ? (long)malloc_usable_size(p) : 0;
    const long now = atomic_fetch_add(&held, size) + size;
    long most = peak;
    while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
    }
    atomic_fetch_add(&calls, 1);
    atomic_fetch_add(&bytes, size);
    return p;
}

void free(void *p) {
    if (p) atomic_fetch_sub(&held, (long)malloc_usable_size(p));
    __libc_free(p);
}
void *malloc(size_t size) { return given(__libc_malloc(size)); }
void *calloc(size_t n, size_t size) { return given(__libc_calloc(n, size)); }
void *realloc(void *p, size_t size) {
    const long before = p ? (long)malloc_usable_size(p) : 0;
    void *q = __libc_realloc(p, size);
    if (q || size == 0) atomic_fetch_sub(&held, before);
    return q ? given(q) : q;
}
void *memalign(size_t line, size_t size) { return given(__libc_memalign(line, size)); }
void *aligned_alloc(size_t line, size_t size) { return memalign(line, size); }
int posix_memalign(void **p, size_t line, size_t size) { return (*p = memalign(line, size)) ? 0 : ENOMEM; }

void allocations_reset(void) {
    calls = bytes = held = peak = 0;
}
long allocations_calls(void) { return calls; }
long allocations_bytes(void) { return bytes; }
long allocations_held(void) { return held; }
long allocations_peak(void) { return peak; }
