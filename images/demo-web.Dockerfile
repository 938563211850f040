# The demo's web for the local cluster: `docker build -f images/demo-web.Dockerfile -t rpl-demo-web .demo/world/web`.
ARG LIGHT=rpl-light
FROM ${LIGHT}
COPY . /web
ENTRYPOINT ["python", "-m", "rpl.demo.server", "/web", "--host", "0.0.0.0"]
