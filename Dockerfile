# The server that stands alone (docs/without-flask.md): docker build -t flask-pg-sse .
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in requirements.txt constraints.txt README.md LICENSE ./
COPY flask_pg_sse ./flask_pg_sse
RUN python -m venv /opt/flask-pg-sse && /opt/flask-pg-sse/bin/pip install --no-cache-dir -c constraints.txt '.[dotenv,redis]'

FROM python:3.13-slim
COPY --from=build /opt/flask-pg-sse /opt/flask-pg-sse
RUN useradd --system --uid 10001 --create-home --home-dir /srv/flask-pg-sse flask-pg-sse
USER 10001
WORKDIR /srv/flask-pg-sse
ENV PATH=/opt/flask-pg-sse/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8001
# /livez, because a server whose PostgreSQL is away must not be restarted: its streams wait.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8001/livez', timeout=2)"]
# Without a shell: the command becomes gunicorn, which so gets SIGTERM itself.
CMD ["flask-pg-sse", "serve", "--host", "0.0.0.0"]
