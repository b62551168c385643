//! The hub, against a stand-in server on the loopback interface that answers as huggingface.co does.

use candle_bitnet::Error;
use candle_bitnet::checkpoint::Checkpoint;
use candle_bitnet::checkpoint::hub::{HubOptions, cache, resolve};
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
    /// Answer everything with this status, and these headers.
    broken: Option<u16>,
    headers: String,
    /// The list tells sizes and hashes, as the hub's does and a mirror's may not.
    blobs: bool,
    /// Answers end after so many bytes of the body; counts down with each.
    cut: Vec<usize>,
    /// A byte of every body is another one.
    corrupt: bool,
    /// The token was sent to the other host.
    leaked: bool,
    /// Ranges are ignored.
    whole: bool,
    /// Paths, with the range asked for.
    log: Vec<String>,
    /// Most requests at a time, and those in progress.
    most: usize,
    open: usize,
    slow: bool,
    closed: bool,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files.iter().map(|(n, b)| ((*n).to_owned(), b.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, blobs: true, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.lock().unwrap().closed {
                    break;
                }
                let (stream, shared) = (stream.unwrap(), Arc::clone(&shared));
                std::thread::spawn(move || {
                    shared.lock().unwrap().open += 1;
                    let _ = answer(stream, address, &shared);
                    shared.lock().unwrap().open -= 1;
                });
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
    let is_head = line.starts_with("HEAD");
    let (path, query) = path.split_once('?').map_or((path.clone(), ""), |(p, q)| (p.to_owned(), q));
    if state.lock().unwrap().slow {
        std::thread::sleep(std::time::Duration::from_millis(150));
    }
    let mut state = state.lock().unwrap();
    state.most = state.most.max(state.open);
    // Whoever keeps the large files has no business with the token.
    state.leaked |= authorised && path.starts_with("/cdn/");
    let from = range.map_or(String::new(), |(from, _)| format!(" from {from}"));
    state.log.push(format!("{}{path}{from}", if is_head { "HEAD " } else { "" }));
    let cut = if path.starts_with("/cdn/") && !state.cut.is_empty() { Some(state.cut.remove(0)) } else { None };
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
        let body = &body[..cut.unwrap_or(body.len()).min(body.len())];
        stream.write_all(if is_head { b"" } else { body })
    };
    if let Some(status) = state.broken {
        return reply(&format!("{status} Broken"), &state.headers, b"");
    }
    let file = |path: &str| {
        let (_, rest) = path.split_once("/resolve/")?;
        let (revision, name) = rest.split_once('/')?;
        (revision == COMMIT).then_some(())?;
        Some((name.to_owned(), state.files.get(name)?.clone()))
    };
    if let Some(revision) = path.strip_prefix("/api/models/owner/model/revision/") {
        if !["main", COMMIT, "refs%2Fpr%2F1", "prequantized"].contains(&revision) {
            return reply("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", b"");
        }
        let sibling = |(name, bytes): (&String, &Vec<u8>)| match state.blobs && query == "blobs=true" {
            false => serde_json::json!({ "rfilename": name }),
            true if is_large(name) => serde_json::json!({ "rfilename": name, "size": bytes.len(),
                "blobId": git_id(bytes), "lfs": { "sha256": etag(name, bytes), "size": bytes.len(), "pointerSize": 130 } }),
            true => serde_json::json!({ "rfilename": name, "size": bytes.len(), "blobId": etag(name, bytes) }),
        };
        let siblings: Vec<_> = state.files.iter().map(sibling).collect();
        return reply("200 OK", "", serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string().as_bytes());
    }
    if path.starts_with("/owner/model/resolve/") && state.gated && !authorised {
        return reply("401 Unauthorized", "X-Error-Code: GatedRepo\r\n", b"");
    }
    let Some((name, mut bytes)) = file(&path) else { return reply("404 Not Found", "", b"") };
    let etag = etag(&name, &bytes);
    let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
    // Large files live elsewhere: the hub redirects, and says of what.
    if is_large(&name) && !path.starts_with("/cdn/") {
        let size = bytes.len();
        let headers = format!(
            "{commit}X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nLocation: http://localhost:{}/cdn{path}\r\n",
            address.port()
        );
        return reply("302 Found", &headers, b"");
    }
    if state.corrupt {
        bytes[0] ^= 1;
    }
    let commit = format!("{commit}ETag: \"{etag}\"\r\n");
    let (from, _) = range.unwrap_or((0, None));
    if range.is_none() || state.whole {
        return reply("200 OK", &commit, &bytes);
    }
    if from >= bytes.len() {
        return reply("416 Range Not Satisfiable", "", b"");
    }
    let headers = format!("{commit}Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
    reply("206 Partial Content", &headers, &bytes[from..])
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

fn git_id(bytes: &[u8]) -> String {
    format!("{:040x}", bytes.iter().fold(bytes.len() as u64, |h, b| h.wrapping_mul(31) ^ u64::from(*b)))
}

/// SHA-256 of large files, git's id of small ones.
fn etag(name: &str, bytes: &[u8]) -> String {
    use sha2::Digest;
    if is_large(name) { format!("{:x}", sha2::Sha256::digest(bytes)) } else { git_id(bytes) }
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
    assert!(resolve("owner/model", &right).is_ok() && !server.state.lock().unwrap().leaked);

    let text = hub_error(resolve("owner/model@v9", &options));
    assert!(text.contains("owner/model@v9") && text.contains("no branch, tag or commit v9"), "{text}");
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
    server.set(|s| drop(s.files.remove("config.json")));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("no config.json"));
    server.set(|s| s.files.retain(|name, _| !is_large(name)));
    assert!(hub_error(resolve("owner/model", &server.options(&empty))).contains("no safetensors weights and no GGUF"));
    server.set(|s| (s.broken, s.headers) = (Some(429), "Retry-After: 77\r\n".into()));
    let text = hub_error(resolve("owner/model", &server.options(&empty)));
    assert!(text.contains("429") && text.contains("wait 77 seconds") && text.contains("HF_TOKEN"), "{text}");
    server.set(|s| (s.broken, s.headers) = (None, String::new()));
}

#[test]
fn what_is_neither_a_directory_nor_an_id_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    std::fs::write(&file, "x").unwrap();
    let options = HubOptions { cache_dir: Some(dir.path().to_owned()), offline: true, ..HubOptions::default() };
    assert_eq!(resolve(dir.path().to_str().unwrap(), &options).unwrap(), dir.path());
    for model in [
        "",
        "bitnet",
        "./missing/model/dir",
        "../a/b",
        "owner/model@../../x",
        "owner/mo del",
        "owner/model:../x.gguf",
        "owner/model:config.json",
        file.to_str().unwrap(),
    ] {
        let err = resolve(model, &options).unwrap_err();
        // What is not there is a failure; what cannot be is bad usage.
        let usage = model.is_empty() || model.contains(['@', ':']);
        assert!(
            if usage { matches!(err, Error::Request { .. }) } else { matches!(err, Error::File { .. }) },
            "{err:?}"
        );
        let text = err.to_string();
        assert!(text.contains("existing directory") && text.contains("hub id"), "{text}");
    }
    std::fs::write(dir.path().join("ca.pem"), "no certificate").unwrap();
    let options = HubOptions { offline: false, ca_file: Some(dir.path().join("ca.pem")), ..options };
    assert!(resolve("owner/model", &options).unwrap_err().to_string().contains("SSL_CERT_FILE"));
    let homeless = HubOptions::default();
    assert!(resolve("owner/model", &homeless).unwrap_err().to_string().contains("HF_HOME"));
}

/// A model of one file of many bytes.
fn large() -> Vec<(&'static str, Vec<u8>)> {
    let weights: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    vec![("config.json", b"{}".to_vec()), ("model.safetensors", weights)]
}

fn blobs(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir.join("../../blobs")).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_interrupted_download_goes_on_where_it_broke_off() {
    let all = large();
    let (server, cache) = (Server::start(&all), tempfile::tempdir().unwrap());
    let options = server.options(&cache);
    // Within one run: each interruption costs one more request, for the rest alone.
    server.set(|s| s.cut = vec![100_000, 50_000]);
    let dir = resolve("owner/model", &options).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), all[1].1);
    let log = server.take_log();
    let at = |from: &str| log.iter().filter(|l| l.starts_with("/cdn/") && l.ends_with(from)).count();
    assert_eq!((at("model.safetensors"), at(" from 100000"), at(" from 150000")), (1, 1, 1), "{log:?}");
    assert_eq!(blobs(&dir).len(), 2, "nothing incomplete is left");

    // From one run to the next: no progress at all ends a run, and what came is kept.
    let again = tempfile::tempdir().unwrap();
    server.set(|s| s.cut = vec![70_000, 0, 0, 0, 0, 0, 0, 0]);
    let text = hub_error(resolve("owner/model", &server.options(&again)));
    assert!(text.contains("70000 of 300000 bytes") || text.contains("check the network"), "{text}");
    assert!(text.contains("goes on from there"), "{text}");
    assert!(cache::list(&again.path().join("hub")).unwrap()[0].incomplete_bytes == 70_000);
    server.set(|s| s.cut.clear());
    server.take_log();
    let dir = resolve("owner/model", &server.options(&again)).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), all[1].1);
    assert!(server.take_log().iter().any(|l| l.starts_with("/cdn/") && l.ends_with(" from 70000")));

    // A server that knows no ranges sends all of it again.
    let again = tempfile::tempdir().unwrap();
    server.set(|s| (s.cut, s.whole) = (vec![70_000], true));
    let dir = resolve("owner/model", &server.options(&again)).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), all[1].1);
}

#[test]
fn damaged_files_are_thrown_away() {
    let all = large();
    let (server, cache) = (Server::start(&all), tempfile::tempdir().unwrap());
    let options = server.options(&cache);
    server.set(|s| s.corrupt = true);
    let text = hub_error(resolve("owner/model", &options));
    assert!(text.contains("model.safetensors arrived damaged twice") && text.contains("SHA-256"), "{text}");
    assert!(resolve("owner/model", &HubOptions { offline: true, ..options.clone() }).is_err());
    server.set(|s| s.corrupt = false);

    // What an earlier run left, damaged or too long, is replaced.
    let root = cache.path().join("hub/models--owner--model/blobs");
    let part = root.join(format!("{}.incomplete", etag("model.safetensors", &all[1].1)));
    for left in [vec![9; 1000], vec![9; 300_000], vec![9; 400_000]] {
        std::fs::write(&part, left).unwrap();
        let dir = resolve("owner/model", &options).unwrap();
        assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), all[1].1);
        std::fs::remove_file(dir.join("model.safetensors")).unwrap();
        std::fs::remove_file(root.join(etag("model.safetensors", &all[1].1))).unwrap();
    }
    // Another process holds it.
    let held = std::fs::File::create(&part).unwrap();
    held.lock().unwrap();
    let text = hub_error(resolve("owner/model", &options));
    assert!(text.contains("another process is downloading model.safetensors"), "{text}");
}

#[test]
fn files_come_several_at_a_time_and_a_mirror_need_not_tell_their_sizes() {
    let server = Server::start(&files("a2_packed_gqa_untied_sharded"));
    server.set(|s| s.slow = true);
    for blobs in [true, false] {
        server.set(|s| (s.blobs, s.most) = (blobs, 0));
        server.take_log();
        let cache = tempfile::tempdir().unwrap();
        let dir = resolve("owner/model", &server.options(&cache)).unwrap();
        assert_eq!(Checkpoint::open(&dir).unwrap().files().len(), 3);
        let heads = server.take_log().iter().filter(|l| l.starts_with("HEAD")).count();
        assert_eq!(heads, if blobs { 0 } else { 6 });
        assert!(server.state.lock().unwrap().most > 1);
    }
}

#[test]
fn a_gguf_file_is_fetched_alone() {
    let mut all = files("a1_packed");
    all.push(("sub/b c.gguf", b"GGUF!".to_vec()));
    let (server, cache) = (Server::start(&all), tempfile::tempdir().unwrap());
    let options = server.options(&cache);
    let path = resolve("owner/model:ggml-model-i2_s.gguf", &options).unwrap();
    assert!(path.ends_with(format!("snapshots/{COMMIT}/ggml-model-i2_s.gguf")) && path.is_file());
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(resolve("owner/model:ggml-model-i2_s.gguf", &offline).unwrap(), path);
    assert!(hub_error(resolve("owner/model:sub/b c.gguf", &offline)).contains("sub/b c.gguf is not in the cache"));
    server.set(|s| drop(s.files.insert("sub/b%20c.gguf".into(), b"GGUF!".to_vec())));
    let deep = resolve(&format!("owner/model@{COMMIT}:sub/b c.gguf"), &options).unwrap();
    assert_eq!(std::fs::read(deep).unwrap(), b"GGUF!");
    assert_eq!(resolve(path.to_str().unwrap(), &offline).unwrap(), path, "a local file is itself");
    let text = hub_error(resolve("owner/model:gone.gguf", &options));
    assert!(text.contains("no file gone.gguf; name one, such as owner/model:"), "{text}");

    // Without safetensors, the only GGUF file is the model; of several, one has to be named.
    server.set(|s| s.files.retain(|name, _| !name.ends_with(".safetensors")));
    let text = hub_error(resolve("owner/model", &server.options(&tempfile::tempdir().unwrap())));
    assert!(text.contains("several GGUF files; name one") && text.contains("ggml-model-i2_s.gguf"), "{text}");
    server.set(|s| s.files.retain(|name, _| !name.starts_with("sub/")));
    let fresh = tempfile::tempdir().unwrap();
    let options = server.options(&fresh);
    assert!(resolve("owner/model", &options).unwrap().ends_with("ggml-model-i2_s.gguf"));
    assert!(
        resolve("owner/model", &HubOptions { offline: true, ..options }).unwrap().ends_with("ggml-model-i2_s.gguf")
    );
}

#[test]
fn a_server_cannot_write_outside_the_cache() {
    let evil = vec![
        ("config.json", b"{}".to_vec()),
        ("../../../../evil.safetensors", b"x".to_vec()),
        ("../e.gguf", b"x".to_vec()),
    ];
    let (server, cache) = (Server::start(&evil), tempfile::tempdir().unwrap());
    let text = hub_error(resolve("owner/model", &server.options(&cache)));
    assert!(text.contains("no safetensors weights"), "{text}");
    assert!(!cache.path().join("evil.safetensors").exists());
    server.set(|s| (s.broken, s.headers) = (Some(200), String::new()));
    assert!(hub_error(resolve("owner/model", &server.options(&cache))).contains("no usable answer"));
}

fn bitnet(cache: &Path, args: &[&str]) -> (Option<i32>, String) {
    let mut command = assert_cmd::Command::cargo_bin("bitnet").unwrap();
    let output = command.args(args).env("HF_HUB_CACHE", cache).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn the_cache_is_listed_and_models_are_removed_from_it() {
    let (server, dir) = (Server::start(&large()), tempfile::tempdir().unwrap());
    let hub = dir.path().join("hub");
    assert_eq!(cache::list(&hub).unwrap(), []);
    resolve("owner/model", &server.options(&dir)).unwrap();
    resolve("owner/model@refs/pr/1", &server.options(&dir)).unwrap();
    std::fs::create_dir_all(hub.join("datasets--a--b")).unwrap();
    let models = cache::list(&hub).unwrap();
    let [model] = &models[..] else { panic!("{models:?}") };
    let [revision] = &model.revisions[..] else { panic!("{models:?}") };
    assert_eq!((model.id.as_str(), model.incomplete_bytes), ("owner/model", 0));
    assert_eq!((revision.files, revision.bytes), (2, 300_002));
    assert_eq!(revision.refs, ["main", "refs/pr/1"]);
    assert!(model.bytes >= revision.bytes && model.bytes < revision.bytes + 200, "{model:?}");

    // A second commit that shares a file, and holds a link to the outside.
    let (root, other) = (hub.join("models--owner--model"), "f".repeat(40));
    let weights = etag("model.safetensors", &large()[1].1);
    std::fs::create_dir_all(root.join("snapshots").join(&other)).unwrap();
    std::fs::write(dir.path().join("precious"), "x").unwrap();
    #[cfg(unix)]
    for (target, name) in [(format!("../../blobs/{weights}"), "m.safetensors"), ("../../../../precious".into(), "p")] {
        std::os::unix::fs::symlink(target, root.join("snapshots").join(&other).join(name)).unwrap();
    }
    let (code, text) = bitnet(&hub, &["cache", "list"]);
    assert!(code == Some(0) && text.contains("owner/model") && text.contains("(main, refs/pr/1), 2 files"), "{text}");
    let (code, text) = bitnet(&hub, &["cache", "list", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &json["models"][0]["id"]), (Some(0), &"owner/model".into()));
    assert_eq!(json["models"][0]["revisions"].as_array().unwrap().len(), 2);

    for (args, code, part) in [
        (&["cache", "rm", "owner/model"][..], 2, "give --yes"),
        (&["cache", "rm", "-y", "owner/gone"], 1, "not in the cache"),
        (&["cache", "rm", "-y", "../x"], 2, "owner/name"),
        (&["cache", "rm", "-y", "owner/model", "owner/gone"], 1, "owner/gone"),
        (&["cache", "rm", "-y", "owner/model@v7"], 1, "revision is not in the cache"),
        (&["cache", "rm"], 2, "MODEL"),
    ] {
        let (found, text) = bitnet(&hub, args);
        assert!(found == Some(code) && text.contains(part), "{args:?}: {found:?} {text}");
    }
    // One revision goes with what only it needs, and with all of its names.
    let (code, text) = bitnet(&hub, &["cache", "rm", "--yes", "--json", "owner/model@main"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &json[0]["commit"]), (Some(0), &COMMIT.into()));
    #[cfg(unix)]
    assert_eq!((&json[0]["bytes"], root.join("blobs").join(&weights).exists()), (&2.into(), true));
    assert!(!root.join("refs/main").exists() && !root.join("snapshots").join(COMMIT).exists());
    let (code, text) = bitnet(&hub, &["cache", "rm", "--yes", "owner/model"]);
    assert!(code == Some(0) && text.contains("removed owner/model (") && !root.exists(), "{text}");
    assert!(dir.path().join("precious").exists() && hub.join("datasets--a--b").exists());

    // A model's folder that is a link leads elsewhere, and is left alone.
    #[cfg(unix)]
    {
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(elsewhere.path().join("f"), "x").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &root).unwrap();
        let (code, text) = bitnet(&hub, &["cache", "rm", "--yes", "owner/model"]);
        assert!(code == Some(1) && text.contains("left alone") && elsewhere.path().join("f").exists(), "{text}");
        assert_eq!(cache::list(&hub).unwrap(), []);
    }
}
