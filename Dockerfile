# The sidecar: one static program and nothing else.
ARG BASE_GO=golang:1.26-trixie

FROM ${BASE_GO} AS build
WORKDIR /src
# Alone, so that the modules are fetched again only when these two change.
COPY go.mod go.sum ./
RUN go mod download
COPY pipe pipe
COPY daemon daemon
ARG VERSION=dev
RUN --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.version=${VERSION}" -o /out/osbuilder ./daemon

FROM scratch
ENV PATH=/bin
COPY --from=build /out/osbuilder /bin/osbuilder
USER 1000:1000
ENTRYPOINT ["/bin/osbuilder"]
CMD ["run"]
