# A server of one model: docker build -t tercet . && docker run -p 127.0.0.1:8000:8000 -e TERCET_SERVE_KEY=... -v $PWD/model:/model:ro tercet
FROM python:3.12-slim

RUN useradd --create-home --uid 10001 tercet
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch first and alone, from the index of CPU builds: they are a tenth as large.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY conf conf
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[serve,search,export]'

USER tercet
WORKDIR /home/tercet
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"
ENTRYPOINT ["tercet", "serve", "host=0.0.0.0", "port=8000"]
CMD ["model=/model"]
