# Images of the server and of the trainer; docs/containers.md says how to build and run them.
#   docker build --target server -t tenuto-server:dev .
#   docker build --target trainer -t tenuto-trainer:dev .
# All stages begin from one image, any with python3 (3.11, for the locks), venv and pip.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY deploy/image/build.lock ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY models models
COPY envs envs
COPY client client
COPY server server
COPY trainer trainer
COPY bench/tenuto_bench bench/tenuto_bench
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

# What both images have. Root owns it, so that the user below cannot change a byte of it.
FROM ${BASE_IMAGE} AS runtime
# cpu, or gpu: torch's GPU build, which brings its own CUDA; the host needs the driver and NVIDIA's container toolkit.
ARG VARIANT=cpu
# Where torch's CPU build is; the hash in the lock says which file it must be. Empty: pip's own configuration knows.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    # The user has no entry in /etc/passwd; torch asks for a name, others for a home.
    HOME=/tmp \
    USER=tenuto \
    NUMBA_CACHE_DIR=/tmp/numba \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY deploy/image/server-${VARIANT}.lock /opt/tenuto/
# The environment gets no pip of its own: the base image's writes into it.
RUN python3 -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python3 install --no-cache-dir --require-hashes --only-binary :all: \
        ${TORCH_INDEX:+"--extra-index-url=$TORCH_INDEX"} -r /opt/tenuto/server-${VARIANT}.lock
COPY --chmod=0755 deploy/image/start.sh /usr/local/bin/tenuto-start
# Nothing here changes its user. New volumes take the owner of the folder that they cover.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && install -d -o 10001 -g 10001 /repository /logs /sessions
WORKDIR /tmp

FROM runtime AS server
COPY --from=wheel /dist /opt/tenuto/
# Whatever modes they have in the clone: the user below runs the health check.
COPY --chmod=0644 deploy/image/health.py deploy/image/warm.py /opt/tenuto/
RUN pip --python /opt/venv/bin/python3 install --no-cache-dir --no-deps --no-index /opt/tenuto/*.whl \
    && NUMBA_CACHE_DIR=/opt/tenuto/numba python3 /opt/tenuto/warm.py \
    && rm -rf /tmp/*
USER 10001:10001
EXPOSE 50051 9464
# Healthy means that steps are answered, so not before there is a policy in the repository, and no more while draining.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python3", "/opt/tenuto/health.py"]
# Later flags go before earlier ones: `docker run … tenuto-server --capacity 1024`. It does not start without
# --tls-certificate and --tls-key, or --insecure: all addresses are the container's, who else reaches them it cannot know.
ENTRYPOINT ["tenuto-start", "tenuto-serve", "--host", "0.0.0.0", "--repository", "/repository"]

# tenuto-train, and tenuto-play with its environments: `docker run … tenuto-trainer tenuto-play --env …`.
FROM runtime AS trainer
ARG VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY deploy/image/trainer-${VARIANT}.lock /opt/tenuto/
RUN pip --python /opt/venv/bin/python3 install --no-cache-dir --require-hashes --only-binary :all: \
        ${TORCH_INDEX:+"--extra-index-url=$TORCH_INDEX"} -r /opt/tenuto/trainer-${VARIANT}.lock
COPY --from=wheel /dist /opt/tenuto/
COPY deploy/image/warm.py /opt/tenuto/
RUN pip --python /opt/venv/bin/python3 install --no-cache-dir --no-deps --no-index /opt/tenuto/*.whl \
    && NUMBA_CACHE_DIR=/opt/tenuto/numba python3 /opt/tenuto/warm.py \
    && rm -rf /tmp/*
USER 10001:10001
ENTRYPOINT ["tenuto-start"]
CMD ["tenuto-train", "--help"]
