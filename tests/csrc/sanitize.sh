#!/usr/bin/env bash
# Builds csrc/ and its stand-alone test with sanitizers and runs it on every instruction set of this machine.
#   address+undefined: all of the code. thread: the threaded path; the test's process has no OpenMP runtime, so that the work runs on
#   std::thread, which ThreadSanitizer understands (it would report false races inside an OpenMP runtime that is not built for it).
# $CXX chooses the compiler; EMULATOR (such as "qemu-aarch64 -L /usr/aarch64-linux-gnu") runs the test of a cross compiler, without sanitizers.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
CXX=${CXX:-g++}
FLAGS="-std=c++17 -g -Wall -Wextra -Werror -fno-omit-frame-pointer -Icsrc"
SOURCES="csrc/gpsa.cpp csrc/instruction_set.cpp csrc/layers.cpp csrc/threads.cpp $(echo csrc/isa_*.cpp) tests/csrc/gpsa_test.cpp"

compile() { # name, flags...
    local name=$1 source objects=()
    shift
    for source in $SOURCES; do
        objects+=("$build/$name.$(basename "$source" .cpp).o")
        echo "$source ${objects[-1]}"
    done | xargs -P 2 -L 1 sh -c "$CXX $FLAGS $* -c \$0 -o \$1"
    for source in $SOURCES; do objects+=("$build/$name.$(basename "$source" .cpp).o"); done
    # shellcheck disable=SC2086
    $CXX $* "${objects[@]}" -o "$build/$name" -ldl -pthread
}

run() { # program: on each instruction set that the machine knows
    local isa ran=0
    for isa in avx512_bf16 avx512 avx2 neon portable; do
        # an instruction set that this machine lacks is refused by name; anything else is a failure
        if CONVIT_CPU_ISA=$isa ${EMULATOR:-} "$1" >"$build/log" 2>&1; then
            echo "$(basename "$1"): $(tail -1 "$build/log")"
            ran=$((ran + 1))
        elif ! grep -q "CONVIT_CPU_ISA must be one of" "$build/log"; then
            cat "$build/log"
            return 1
        fi
    done
    test "$ran" -gt 0
}

if [ -n "${EMULATOR:-}" ]; then
    compile emulated -O2 -static
    run "$build/emulated"
    exit
fi
compile address+undefined -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
run "$build/address+undefined"
compile thread -O1 -fsanitize=thread
run "$build/thread"
# the NEON code, where a cross compiler and an emulator are at hand
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    CXX=aarch64-linux-gnu-g++ EMULATOR=qemu-aarch64 bash tests/csrc/sanitize.sh
fi
