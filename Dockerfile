# Training and serving on CPU: docker build -t convit . && docker run --init -p 8000:8000 -v $PWD/runs:/runs convit serve /runs/RUN --host 0.0.0.0
# --build-arg PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU builds) leaves out CUDA's libraries, some gigabytes
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build && CONVIT_BUILD_EXT=1 python -m build --wheel --outdir /wheels

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
RUN useradd --create-home --uid 1000 convit && mkdir /runs && chown convit /runs
COPY --from=build /wheels /wheels
RUN wheel="$(echo /wheels/*.whl)" && pip install --no-cache-dir "${wheel}[train,serve,export,hub]" && rm -r /wheels
USER 1000
WORKDIR /runs
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["convit"]
CMD ["--help"]
