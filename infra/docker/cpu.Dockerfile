# facepipe on CPUs. The weights come with the packages, so that containers need no network.
#   docker build -f infra/docker/cpu.Dockerfile -t facepipe:cpu .
#   docker run --rm --shm-size=1g -v /photos:/photos:ro -v /gallery:/gallery facepipe:cpu embed /photos /gallery
FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --create-home --uid 10001 facepipe
WORKDIR /opt/facepipe
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY facepipe facepipe
COPY pipelines pipelines
COPY jobs jobs
RUN pip install --constraint constraints.txt '.[cpu,s3,report]'
USER facepipe
ENTRYPOINT ["facepipe"]
