//! The hub, against a stand-in server on the loopback interface that answers as huggingface.co does.

use candle_bitnet::Error;
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::checkpoint::hub::{HubOptions, resolve};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Files need the token; the listing does not, as with gated models.
    gated: bool,
    /// Answer everything with this status.
    broken: Option<u16>,
    log: Vec<String>,
    closed: bool,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files.iter().map(|(n, b)| ((*n).to_owned(), b.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.lock().unwrap().closed {
                    break;
                }
                let _ = answer(stream.unwrap(), address, &shared);
            }
        });
        Self { address, state }
    }

    fn options(&self, cache: &TempDir) -> HubOptions {
        HubOptions {
            cache_dir: Some(cache.path().join("hub")),
            endpoint: Some(format!("http://{}", self.address)),
            ..HubOptions::default()
        }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.set(|s| s.closed = true);
        let _ = TcpStream::connect(self.address);
    }
}

fn answer(mut stream: TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut authorised) = (None, false);
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header == "\r\n" {
            break;
        }
        let (name, value) = header.trim().split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (from, to) = value.trim_start_matches("bytes=").split_once('-').unwrap();
                range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
            }
            "authorization" => authorised = value == format!("Bearer {TOKEN}"),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.log.push(path.clone());
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
        stream.write_all(body)
    };
    if let Some(status) = state.broken {
        return reply(&format!("{status} Broken"), "", b"");
    }
    let file = |path: &str| {
        let (_, rest) = path.split_once("/resolve/")?;
        let (revision, name) = rest.split_once('/')?;
        (revision == COMMIT).then_some(())?;
        Some((name.to_owned(), state.files.get(name)?.clone()))
    };
    if let Some(revision) = path.strip_prefix("/api/models/owner/model/revision/") {
        if revision != "main" && revision != COMMIT && revision != "refs%2Fpr%2F1" {
            return reply("404 Not Found", "", b"");
        }
        let siblings: Vec<_> = state.files.keys().map(|n| serde_json::json!({ "rfilename": n })).collect();
        return reply("200 OK", "", serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string().as_bytes());
    }
    if path.starts_with("/owner/model/resolve/") && state.gated && !authorised {
        return reply("401 Unauthorized", "", b"");
    }
    let Some((name, bytes)) = file(&path) else { return reply("404 Not Found", "", b"") };
    let etag = format!("{:x}", bytes.iter().fold(name.len(), |h, b| h.wrapping_mul(31) ^ *b as usize));
    let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
    // Large files live elsewhere: the hub redirects, and says of what.
    if name.ends_with(".safetensors") && !path.starts_with("/cdn/") {
        let headers = format!("{commit}X-Linked-Etag: \"{etag}\"\r\nLocation: http://{address}/cdn{path}\r\n");
        return reply("302 Found", &headers, b"");
    }
    let (from, to) = range.unwrap_or((0, None));
    if from > 0 && from >= bytes.len() {
        return reply("416 Range Not Satisfiable", "", b"");
    }
    let to = to.unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
    let headers = format!("{commit}ETag: \"{etag}\"\r\nContent-Range: bytes {from}-{to}/{}\r\n", bytes.len());
    reply("206 Partial Content", &headers, &bytes[from..=to])
}

/// The files of a fixture, with names of others that must not be fetched.
fn files(fixture: &str) -> Vec<(&'static str, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
    let mut files: Vec<(&str, Vec<u8>)> =
        ["README.md", "pytorch_model.bin", "ggml-model-i2_s.gguf", "original/a.safetensors"]
            .map(|n| (n, b"x".to_vec()))
            .into();
    for name in [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ] {
        files.extend(std::fs::read(dir.join(name)).ok().map(|bytes| (name, bytes)));
    }
    files.push(("tokenizer.json", b"{}".to_vec()));
    files
}

fn hub_error(result: candle_bitnet::Result<std::path::PathBuf>) -> String {
    let err = result.unwrap_err();
    assert!(matches!(err, Error::Hub { .. }), "{err:?}");
    err.to_string()
}

#[test]
fn a_model_is_downloaded_once_and_then_found_offline() {
    let (server, cache) = (Server::start(&files("a1_packed")), tempfile::tempdir().unwrap());
    let options = server.options(&cache);
    let dir = resolve("owner/model", &options).unwrap();
    assert!(dir.ends_with(format!("hub/models--owner--model/snapshots/{COMMIT}")), "{}", dir.display());
    assert_eq!(Checkpoint::open(&dir).unwrap().tensors().len(), 38);
    let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let refs: Vec<_> = std::fs::read_dir(dir.join("../../refs")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(refs, ["main"]);

    server.take_log();
    assert_eq!(resolve("owner/model", &options).unwrap(), dir);
    assert_eq!(server.take_log(), ["/api/models/owner/model/revision/main"], "only asks whether it is current");
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(resolve("owner/model", &offline).unwrap(), dir);
    assert_eq!(resolve(&format!("owner/model@{COMMIT}"), &options).unwrap(), dir);
    assert!(server.take_log().is_empty());

    // An unreachable or failing hub is no obstacle once the model is there.
    server.set(|s| s.broken = Some(503));
    assert_eq!(resolve("owner/model", &options).unwrap(), dir);
    let nowhere = HubOptions { endpoint: Some("http://127.0.0.1:9".into()), ..options };
    assert_eq!(resolve("owner/model", &nowhere).unwrap(), dir);
}

#[test]
fn shards_come_by_their_index() {
    let all = files("a2_packed_gqa_untied_sharded");
    let (server, cache) = (Server::start(&all), tempfile::tempdir().unwrap());
    let options = HubOptions { revision: Some("refs/pr/1".into()), ..server.options(&cache) };
    let dir = resolve("owner/model", &options).unwrap();
    assert_eq!(Checkpoint::open(&dir).unwrap().files().len(), 3);

    // A shard that vanished from the cache makes the snapshot incomplete.
    std::fs::remove_file(dir.join("model-00002-of-00003.safetensors")).unwrap();
    let offline = HubOptions { offline: true, ..options };
    let text = hub_error(resolve("owner/model", &offline));
    assert!(text.contains("owner/model@refs/pr/1") && text.contains("model-00002-of-00003.safetensors"), "{text}");
    assert!(text.contains("--offline"), "{text}");

    let fresh = tempfile::tempdir().unwrap();
    server.set(|s| drop(s.files.remove("model-00003-of-00003.safetensors")));
    let text = hub_error(resolve("owner/model", &server.options(&fresh)));
    assert!(text.contains("model-00003-of-00003.safetensors, which is not there"), "{text}");

    let evil = br#"{"weight_map": {"a": "../../../evil.safetensors"}}"#.to_vec();
    server.set(|s| drop(s.files.insert("model.safetensors.index.json".into(), evil)));
    let err = resolve("owner/model", &server.options(&tempfile::tempdir().unwrap())).unwrap_err().to_string();
    assert!(err.contains("model.safetensors.index.json") && err.contains("plain"), "{err}");
}

#[test]
fn gated_and_missing_models_say_what_to_do() {
    let (server, cache) = (Server::start(&files("a1_packed")), tempfile::tempdir().unwrap());
    server.set(|s| s.gated = true);
    let options = server.options(&cache);
    let text = hub_error(resolve("owner/model", &options));
    assert!(text.contains("HF_TOKEN") && text.contains("/owner/model and set") && text.contains("no token"), "{text}");
    let wrong = HubOptions { token: Some("hf_wrong".into()), ..options.clone() };
    let text = hub_error(resolve("owner/model", &wrong));
    assert!(text.contains("the token given") && !text.contains("hf_wrong"), "{text}");
    let right = HubOptions { token: Some(TOKEN.into()), ..options.clone() };
    assert!(resolve("owner/model", &right).is_ok());

    let text = hub_error(resolve("owner/model@v9", &options));
    assert!(text.contains("owner/model@v9") && text.contains("not found"), "{text}");
    let text = hub_error(resolve("owner/other", &options));
    assert!(text.contains("not found") && text.contains("no directory of that name"), "{text}");

    let empty = tempfile::tempdir().unwrap();
    let offline = HubOptions { offline: true, ..server.options(&empty) };
    let text = hub_error(resolve("owner/model", &offline));
    assert!(text.contains("not in the cache") && text.contains("run once without --offline"), "{text}");
    let nowhere = HubOptions { endpoint: Some("http://127.0.0.1:9".into()), ..server.options(&empty) };
    let text = hub_error(resolve("owner/model", &nowhere));
    assert!(text.contains("http://127.0.0.1:9") && text.contains("check the network"), "{text}");
    server.set(|s| s.broken = Some(500));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("HTTP 500"));
    server.set(|s| s.broken = Some(401));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("HF_TOKEN"));
    server.set(|s| (s.broken, s.gated) = (None, false));
    server.set(|s| drop(s.files.remove("model.safetensors")));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("no safetensors weights"));
    server.set(|s| drop(s.files.remove("config.json")));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("no config.json"));
}

#[test]
fn what_is_neither_a_directory_nor_an_id_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    std::fs::write(&file, "x").unwrap();
    let options = HubOptions { cache_dir: Some(dir.path().to_owned()), offline: true, ..HubOptions::default() };
    assert_eq!(resolve(dir.path().to_str().unwrap(), &options).unwrap(), dir.path());
    for model in
        ["", "bitnet", "./missing/model/dir", "../a/b", "owner/model@../../x", "owner/mo del", file.to_str().unwrap()]
    {
        let err = resolve(model, &options).unwrap_err();
        // What is not there is a failure; what cannot be is bad usage.
        let usage = model.is_empty() || model.contains('@');
        assert!(
            if usage { matches!(err, Error::Request { .. }) } else { matches!(err, Error::File { .. }) },
            "{err:?}"
        );
        let text = err.to_string();
        assert!(text.contains("existing directory") && text.contains("hub id"), "{text}");
    }
    let homeless = HubOptions::default();
    assert!(resolve("owner/model", &homeless).unwrap_err().to_string().contains("HF_HOME"));
}
