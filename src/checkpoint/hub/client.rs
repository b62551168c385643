//! Requests to the hub: what a repository holds, and the bytes of its files.

use super::DEFAULT_ENDPOINT;
use super::HubOptions;
use crate::checkpoint::limits::quoted;
use crate::checkpoint::open::read_text;
use crate::{Error, Result};
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Bytes of the list of a repository's files; a file takes about 200.
const MAX_LISTING: u64 = 16 << 20;
/// Bytes of a file of certificates; a system's has 250 kB.
const MAX_CERTIFICATES: u64 = 4 << 20;
/// Silence after which a connection is given up, and the download resumed on another.
const SILENCE: Duration = Duration::from_secs(60);

/// Why there is no usable answer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// A status that is no success; what the hub calls it (`X-Error-Code`), and seconds to wait.
    Status { status: u16, code: String, retry_after: Option<u64> },
    /// No answer at all, or one that broke off.
    Network(String),
    /// An answer that makes no sense.
    Nonsense(String),
}

/// A commit and its files.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    pub sha: String,
    pub siblings: Vec<Sibling>,
}

impl Listing {
    /// Reads the hub's answer.
    pub fn parse(answer: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(answer).map_err(|e| Refusal::Nonsense(e.to_string()))
    }
}

/// A file of a repository.
#[derive(Debug, Deserialize)]
pub(super) struct Sibling {
    #[serde(rename = "rfilename")]
    pub name: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// What identifies a file's content: its SHA-256 for large files, git's id for small ones; and its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub etag: String,
    pub size: Option<u64>,
}

impl Sibling {
    /// The content's identity, where the hub tells it with the list.
    pub fn identity(&self) -> Option<Identity> {
        let (etag, size) = match &self.lfs {
            Some(lfs) => (lfs.sha256.clone(), lfs.size.or(self.size)),
            None => (self.blob.clone(), self.size),
        };
        etag.filter(|etag| is_etag(etag)).map(|etag| Identity { etag, size })
    }
}

/// Names a file in the cache, so it may be no path.
fn is_etag(etag: &str) -> bool {
    (8..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    token: Option<&'a str>,
}

impl<'a> Client<'a> {
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] if the certificates cannot be read.
    pub fn new(options: &'a HubOptions) -> Result<Self> {
        let tls = match &options.ca_file {
            Some(path) => TlsConfig::builder().root_certs(certificates(path)?).build(),
            None => TlsConfig::default(),
        };
        let agent = Agent::config_builder()
            .tls_config(tls)
            // Statuses are looked at here, with the headers that explain them.
            .http_status_as_error(false)
            // Large files lie on other hosts, which must not see the token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("candle-bitnet/", env!("CARGO_PKG_VERSION")))
            // Sizes and positions are those of the file.
            .accept_encoding("identity")
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .into();
        let endpoint = options.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT);
        Ok(Self { agent, endpoint, token: options.token.as_deref() })
    }

    pub fn endpoint(&self) -> &str {
        self.endpoint
    }

    /// The commit that a revision is, and its files.
    pub fn listing(&self, id: &str, revision: &str) -> Result<Listing, Refusal> {
        let url = format!("{}/api/models/{id}/revision/{}?blobs=true", self.endpoint, encoded(revision, false));
        let mut response = self.get(&url, 0)?;
        let answer = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let answer = answer.map_err(|e| match e {
            ureq::Error::BodyExceedsLimit(_) => {
                Refusal::Nonsense(format!("a list of files of more than {MAX_LISTING} bytes"))
            }
            e => network(e),
        })?;
        Listing::parse(&answer)
    }

    /// Address of a commit's file.
    pub fn url(&self, id: &str, commit: &str, name: &str) -> String {
        format!("{}/{id}/resolve/{commit}/{}", self.endpoint, encoded(name, true))
    }

    /// The identity of a file of which the list does not tell it (of a mirror), from the headers that the hub sends before
    /// it redirects to another host.
    pub fn identity(&self, url: &str) -> Result<Identity, Refusal> {
        let request = self.agent.head(url).config().max_redirects(0).build();
        let request = match self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        };
        let response = request.call().map_err(network)?;
        let response = if response.status().is_redirection() { response } else { accepted(response)? };
        let headers = response.headers();
        let size = header(headers, "x-linked-size").or_else(|| header(headers, "content-length"));
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        match etag.filter(|etag| is_etag(etag)) {
            Some(etag) => Ok(Identity { etag, size: size.and_then(|size| size.parse().ok()) }),
            None => Err(Refusal::Nonsense("it names no content (ETag)".into())),
        }
    }

    /// The answer to a request for what begins at byte `from`.
    pub fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Refusal> {
        let mut request = self.agent.get(url);
        if let Some(token) = self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        accepted(request.call().map_err(network)?)
    }
}

fn certificates(path: &Path) -> Result<RootCerts> {
    let text = read_text(path, MAX_CERTIFICATES)?;
    let found = parse_pem(text.as_bytes()).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    match found.collect::<Vec<_>>() {
        none if none.is_empty() => Err(Error::file(
            path,
            "holds no certificates (PEM), though REQUESTS_CA_BUNDLE or SSL_CERT_FILE names it; correct or unset that",
        )),
        found => Ok(RootCerts::new_with_certs(&found)),
    }
}

fn network(e: ureq::Error) -> Refusal {
    Refusal::Network(quoted(&e.to_string()))
}

fn accepted(response: Response<Body>) -> Result<Response<Body>, Refusal> {
    if response.status().is_success() {
        return Ok(response);
    }
    let headers = response.headers();
    Err(Refusal::Status {
        status: response.status().as_u16(),
        code: quoted(header(headers, "x-error-code").unwrap_or_default()),
        retry_after: header(headers, "retry-after").and_then(|s| s.parse().ok()),
    })
}

pub(super) fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Percent-encodes what is not unreserved; a revision is one segment of a path, a file's name may have several.
fn encoded(text: &str, slashes: bool) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || slashes && b == b'/';
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded_and_identities_are_no_paths() {
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/ü.gguf", true), "a%20b/%C3%BC.gguf");
        assert!(is_etag("0123456789abcdef") && is_etag("d41d8cd98f00b204e9800998ecf8427e-12"));
        for etag in ["", "../../evil", "a/b/c/d/e/f", "....", "aaaaaaaa\0"] {
            assert!(!is_etag(etag), "{etag}");
        }
        let sibling: Sibling = serde_json::from_str(
            r#"{"rfilename": "a", "size": 3, "blobId": "0123456789", "lfs": {"sha256": "abcdefabcdef", "size": 4}}"#,
        )
        .unwrap();
        assert_eq!(sibling.identity(), Some(Identity { etag: "abcdefabcdef".into(), size: Some(4) }));
        let sibling: Sibling = serde_json::from_str(r#"{"rfilename": "a", "blobId": "../../../x"}"#).unwrap();
        assert_eq!(sibling.identity(), None);
    }
}
