# facepipe on CPUs: for `docker run`, and as a Ray node under KubeRay. The weights come with the packages, so that
# containers need no network.
#   docker build -f infra/docker/cpu.Dockerfile -t facepipe:0.1.0-cpu .
#   docker run --rm --init --shm-size=1g -v /photos:/photos:ro -v /gallery:/gallery facepipe:0.1.0-cpu embed /photos /gallery
#
# The base is pinned to a patch release by its tag, which its publisher rebuilds when Debian ships fixes. A build that must
# be the same bit by bit pins the digest as well (python:3.11.14-slim-trixie@sha256:...) and moves it on a schedule: a
# digest that nobody moves keeps yesterday's holes. `docker buildx imagetools inspect TAG` prints it.
FROM python:3.11.14-slim-trixie AS build
# torch is not in it: ONNX Runtime runs the models on CPUs. Training, MTCNN and models from checkpoints need the extra
# `train` below as well, from the index that torch's project serves its builds for CPUs from.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
COPY pyproject.toml README.md LICENSE ./
COPY facepipe facepipe
COPY pipelines pipelines
COPY jobs jobs
# ray[default]: the dashboard's agents take jobs from KubeRay and serve the metrics; ray[data,train] comes without them.
RUN pip install --constraint constraints.txt '.[cpu,s3,report]' 'ray[default]'
# opencv-python links Qt, X11 and Mesa (150 MB of Debian packages, none of them used); the headless build decodes the same.
RUN sed -n 's/^opencv-python==/opencv-python-headless==/p' constraints.txt > headless.txt \
    && pip uninstall --yes opencv-python \
    && pip install --no-deps --requirement headless.txt

FROM python:3.11.14-slim-trixie
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="facepipe" \
      org.opencontainers.image.description="Batch face embedding, on CPUs" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
# wget: KubeRay's probes call it where Ray or the operator is too old for HTTP probes. Its version is left to Debian, which
# removes old ones from its mirrors: a pinned one stops building within weeks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 facepipe \
    && useradd --create-home --uid 10001 --gid 10001 --shell /bin/bash facepipe
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# KubeRay starts Ray through `bash -lc` in most versions, and Debian's /etc/profile forgets PATH for a login shell.
RUN echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/facepipe.sh
# By number: Kubernetes cannot tell that a name is not root (runAsNonRoot).
USER 10001:10001
WORKDIR /home/facepipe
# The weights are here and whole, every engine loads, and a login shell finds Ray and its jobs: else there is no image.
RUN facepipe doctor \
    && python -c "import facepipe, numpy as np; facepipe.encode([np.zeros((64, 64, 3), np.uint8)])" \
    && bash -lc 'ray --version && ray job submit --help > /dev/null && wget --version > /dev/null'
ENTRYPOINT ["facepipe"]
