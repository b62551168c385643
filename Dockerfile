# The program for CPUs: docker build -t bitnet . && docker run --rm bitnet generate --prompt "ROMEO:"
# Models of the hub are kept in /cache: docker run --rm -it -v bitnet-cache:/cache bitnet chat --model microsoft/bitnet-b1.58-2B-4T
#
# Not built where this was written, as there was no Docker daemon.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY benches benches
COPY kernels kernels
COPY models models
COPY src src
# Kernels are chosen at run time, so that one image is for every CPU of its architecture.
RUN CARGO_PROFILE_RELEASE_STRIP=true cargo build --locked --release

FROM debian:bookworm-slim
COPY --from=build /src/target/release/bitnet /usr/local/bin/bitnet
RUN useradd --create-home bitnet && install -d -o bitnet /cache
USER bitnet
WORKDIR /home/bitnet
ENV HF_HOME=/cache
VOLUME /cache
ENTRYPOINT ["bitnet"]
CMD ["--help"]
