//! How the hub is reached, and what the environment says of it.

use crate::checkpoint::open::read_text;
use std::path::PathBuf;
use std::time::Duration;

/// Where the hub is unless `HF_ENDPOINT` says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How to reach the hub.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit; a revision in the model's name wins. `main` if none is given.
    pub revision: Option<String>,
    /// Use only what the cache holds.
    pub offline: bool,
    /// Show progress bars on stderr.
    pub progress: bool,
    /// The cache, `…/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// [`DEFAULT_ENDPOINT`] if none is given.
    pub endpoint: Option<String>,
    /// Access token.
    pub token: Option<String>,
    /// Certificates (PEM) that the hub's has to lead to, instead of the usual authorities': of a proxy that reads along.
    pub ca_file: Option<PathBuf>,
    /// Longest wait before a failed request is tried again, and for another process that downloads the same file.
    pub patience: Duration,
}

/// [`HubOptions::patience`] where the environment decides the rest.
const PATIENCE: Duration = Duration::from_secs(10);

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the token itself.
        let token = self.token.as_ref().map(|_| "…");
        let Self { revision, offline, progress, cache_dir, endpoint, ca_file, patience, .. } = self;
        f.debug_struct("HubOptions")
            .field("revision", revision)
            .field("offline", offline)
            .field("progress", progress)
            .field("cache_dir", cache_dir)
            .field("endpoint", endpoint)
            .field("token", &token)
            .field("ca_file", ca_file)
            .field("patience", patience)
            .finish()
    }
}

impl HubOptions {
    /// What the environment says: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN` (or the token that
    /// `hf auth login` stored), `HF_ENDPOINT`, `HF_HUB_OFFLINE`; `REQUESTS_CA_BUNDLE` or `SSL_CERT_FILE`.
    pub fn from_env() -> Self {
        Self::from_vars(|key| std::env::var(key).ok().filter(|v| !v.is_empty()), std::env::home_dir())
    }

    /// [`HubOptions::from_env`] on given variables.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>, user_home: Option<PathBuf>) -> Self {
        let dir = |key| var(key).map(PathBuf::from);
        let cache = || dir("XDG_CACHE_HOME").or_else(|| Some(user_home?.join(".cache")));
        let home = dir("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
        let stored = || {
            let path = dir("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")))?;
            read_text(&path, 4096).ok()
        };
        let token = var("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let yes = |v: String| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str());
        Self {
            revision: None,
            offline: var("HF_HUB_OFFLINE").is_some_and(yes),
            progress: false,
            cache_dir: dir("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub"))),
            endpoint: var("HF_ENDPOINT").map(|e| e.trim_end_matches('/').to_owned()),
            token,
            ca_file: dir("REQUESTS_CA_BUNDLE").or_else(|| dir("SSL_CERT_FILE")),
            patience: PATIENCE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_environment_is_read_as_huggingface_hub_reads_it() {
        let vars = |set: &'static [(&str, &str)]| {
            move |key: &str| set.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned())
        };
        let o = HubOptions::from_vars(vars(&[]), Some("/home/u".into()));
        assert_eq!(o.cache_dir.unwrap(), Path::new("/home/u/.cache/huggingface/hub"));
        assert!(!o.offline && o.token.is_none() && o.endpoint.is_none() && o.ca_file.is_none());
        let o = HubOptions::from_vars(
            vars(&[("HF_HOME", "/hf"), ("HF_HUB_OFFLINE", "True"), ("HF_TOKEN", " t\n"), ("HF_ENDPOINT", "http://h/")]),
            None,
        );
        assert_eq!(o.cache_dir.as_deref(), Some(Path::new("/hf/hub")));
        assert_eq!((o.offline, o.token.as_deref(), o.endpoint.as_deref()), (true, Some("t"), Some("http://h")));
        assert!(!format!("{o:?}").contains("\"t\"") && o.patience == PATIENCE, "the token is not printed");
        let o = HubOptions::from_vars(
            vars(&[("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0"), ("SSL_CERT_FILE", "/ca")]),
            None,
        );
        assert_eq!((o.cache_dir.as_deref(), o.offline), (Some(Path::new("/c")), false));
        assert_eq!(o.ca_file.as_deref(), Some(Path::new("/ca")));
        assert_eq!(
            HubOptions::from_vars(vars(&[("XDG_CACHE_HOME", "/x")]), None).cache_dir.unwrap(),
            Path::new("/x/huggingface/hub")
        );
    }
}
