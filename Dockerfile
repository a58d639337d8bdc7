# labkeeper in one container: the API on port 80, JupyterLab on port 8888, notebooks in /notebooks.
#   docker build -t jupyter-server .
#   docker run --name mytest -p 8888:8888 -p 80:80 -v "$PWD/notebooks:/notebooks" jupyter-server

# Any Debian-based image with python3 (3.11 or later) and venv.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# If PyPI cannot be reached, name a mirror: --build-arg PIP_INDEX_URL=...
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_CERT=/build/trusted.crt
WORKDIR /build
COPY docker/certificates docker/certificates
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends ca-certificates \
 && find docker/certificates -name '*.crt' -exec cat {} + | cat /etc/ssl/certs/ca-certificates.crt - > trusted.crt \
 && python3 -m venv tools \
 && python3 -m venv --without-pip /opt/labkeeper \
 && python3 -m venv /opt/jupyter
# Two environments: packages added to JupyterLab's do not change the keeper's, and kernels do not see the keeper's.
COPY requirements requirements
RUN tools/bin/pip install -q --no-deps --require-hashes -r requirements/build.lock \
 && tools/bin/pip --python /opt/labkeeper install -q --no-deps --require-hashes -r requirements/keeper.lock
RUN tools/bin/pip --python /opt/jupyter install -q --no-deps --require-hashes -r requirements/lab.lock \
 && find /opt/jupyter/share/jupyter/lab -name '*.map' -delete
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN tools/bin/pip wheel -q --no-deps --no-build-isolation -w dist . \
 && tools/bin/pip --python /opt/labkeeper install -q --no-deps --no-index dist/*.whl
COPY docker/jupyter_server_config.py /opt/jupyter/etc/jupyter/

FROM ${BASE}
LABEL org.opencontainers.image.title="jupyter-server" \
      org.opencontainers.image.description="JupyterLab servers on demand, by HTTP API" \
      org.opencontainers.image.licenses="BSD-3-Clause"
# The container's user, whoever that is, creates the state directory in /var/lib/labkeeper: everyone may write there, as in /tmp.
RUN useradd --uid 1000 --user-group --no-log-init --home-dir /var/lib/labkeeper/home --shell /bin/bash labkeeper \
 && useradd --system --no-create-home --shell /usr/sbin/nologin labkeeper-edge \
 && install -d -m 1777 -o labkeeper -g labkeeper /notebooks /var/lib/labkeeper \
 && ln -s /opt/labkeeper/bin/labkeeper /usr/local/bin/labkeeper \
 && python3 -m compileall -q "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# Its user may add packages: in a derived image, or with %pip in a notebook, until the container is removed.
COPY --from=build --chown=labkeeper:labkeeper /opt/jupyter /opt/jupyter
COPY --from=build /opt/labkeeper /opt/labkeeper
COPY docker/entrypoint docker/healthcheck /usr/local/libexec/labkeeper/
ENV PATH=/opt/jupyter/bin:$PATH \
    LANG=C.UTF-8 \
    LABKEEPER_HOST=0.0.0.0 \
    LABKEEPER_PORT=80 \
    LABKEEPER_LAB_IP=0.0.0.0 \
    LABKEEPER_LAB_PORT=8888 \
    LABKEEPER_LAB_ADDRESS=port \
    LABKEEPER_NOTEBOOK_DIR=/notebooks \
    LABKEEPER_STATE_DIR=/var/lib/labkeeper/state \
    LABKEEPER_JUPYTER_PYTHON=/opt/jupyter/bin/python3 \
    LABKEEPER_ECHO_LOGS=true \
    LABKEEPER_LOG_FORMAT=console
EXPOSE 80 8888
WORKDIR /notebooks
USER labkeeper
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["/usr/local/libexec/labkeeper/healthcheck"]
# The keeper has its own init, whose environment servers cannot read: in that of another init they would find LABKEEPER_TOKEN.
ENTRYPOINT ["/usr/local/libexec/labkeeper/entrypoint"]
CMD ["labkeeper", "serve"]
