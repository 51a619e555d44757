# The sidecar: one static program and nothing else.
ARG BASE_GO=golang:1.26-trixie

FROM ${BASE_GO} AS build
WORKDIR /src
# Alone, so that the modules are fetched again only when these two change.
COPY go.mod go.sum ./
RUN go mod download
COPY pipe pipe
COPY daemon daemon
RUN --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -buildvcs=false \
      -ldflags "-s -w" -o /out/bin/osbuilder ./daemon && \
    mkdir -m 1777 /out/tmp

FROM scratch
ENV PATH=/bin
# With /tmp and its mode: were it absent, the engine would make it, and from the second start on the tmpfs on it would
# have the mode of what was made, in which only root may write.
COPY --from=build /out/ /
USER 1000:1000
ENTRYPOINT ["/bin/osbuilder"]
CMD ["run"]
