//! A hub that means harm, or is none: whatever it answers, the error names the repository, the reason and what to do, and
//! nothing is left that could be taken for a model.

use candle_bitnet::checkpoint::hub::{HubOptions, resolve};
use candle_bitnet::{Error, Result};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const LISTING: &str = "/api/models/owner/model/revision/main";

/// A server that answers each path as it is told.
struct Hub {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    cache: TempDir,
}

impl Hub {
    fn new(answer: impl Fn(&str, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (closed, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stop, count, answer) = (Arc::clone(&closed), Arc::clone(&requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone()?);
                    let mut line = String::new();
                    reader.read_line(&mut line)?;
                    let mut header = line.clone();
                    while header != "\r\n" && !header.is_empty() {
                        header.clear();
                        reader.read_line(&mut header)?;
                    }
                    let path = line.split([' ', '?']).nth(1).unwrap_or_default();
                    answer(path, &mut stream)
                });
            }
        });
        Self { address, closed, requests, cache: tempfile::tempdir().unwrap() }
    }

    /// One that answers the question what there is, and nothing else.
    fn listing(body: Vec<u8>) -> Self {
        Self::new(move |_, stream| ok(stream, &body))
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            cache_dir: Some(self.cache.path().join("hub")),
            endpoint: Some(format!("http://{}", self.address)),
            patience: Duration::from_millis(10),
            ..HubOptions::default()
        }
    }

    fn resolve(&self) -> Result<PathBuf> {
        resolve("owner/model", &self.options())
    }

    /// The error's text; nothing that came is found offline.
    fn refuses(&self, words: &[&str]) -> String {
        let start = Instant::now();
        let error = self.resolve().expect_err(words[0]);
        assert!(start.elapsed() < Duration::from_secs(20), "{error}");
        let text = error.to_string();
        assert!(matches!(error, Error::Hub { .. }) && text.starts_with("hub repository owner/model: "), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
        assert!(text.len() < 700 && !text.chars().any(|c| c.is_control()), "{text:?}");
        assert!(resolve("owner/model", &HubOptions { offline: true, ..self.options() }).is_err());
        text
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn ok(stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(body)
}

/// A list of two files; the weights are said to have so many bytes.
fn two_files(size: u64) -> Vec<u8> {
    let files = serde_json::json!([
        { "rfilename": "config.json", "size": 2, "blobId": "0123456789" },
        { "rfilename": "model.safetensors", "size": size, "blobId": "9876543210" },
    ]);
    serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string().into_bytes()
}

#[test]
fn answers_that_are_no_list_of_files_are_refused() {
    let unusable = "gives no usable answer for the repository";
    let cases: Vec<(&[u8], &str)> = vec![
        (b"", "EOF"),
        (b"<!DOCTYPE html><html><body>Log in to the network</body></html>", "line 1 column 1"),
        (b"not found", "line 1 column 2"),
        (b"[]", "invalid"),
        (b"{}", "missing field"),
        (b"null", "invalid type"),
        (br#"{"sha": "x"}"#, "siblings"),
        (br#"{"sha": 7, "siblings": []}"#, "a string"),
        (br#"{"sha": "x", "siblings": {}}"#, "a sequence"),
        (br#"{"sha": "x", "siblings": [7]}"#, "invalid type"),
        (br#"{"sha": "x", "siblings": [{}]}"#, "rfilename"),
        (br#"{"sha": "x", "siblings": [{"rfilename": null}]}"#, "a string"),
        (br#"{"sha": "x", "siblings": [{"rfilename": "a", "size": -1}]}"#, "u64"),
        (br#"{"sha": "x", "siblings": [{"rfilename": "a", "size": "1"}]}"#, "u64"),
        (br#"{"sha": "x", "siblings": [{"rfilename": "a", "lfs": []}]}"#, "lfs"),
        (br#"{"sha": "x", "siblings": []} {}"#, "trailing"),
        (b"{\"sha\": \"\xff\", \"siblings\": []}", "unicode"),
    ];
    for (body, reason) in cases {
        // Messages of serde_json for `lfs` name the struct instead of the key.
        let reason = if reason == "lfs" { "line 1" } else { reason };
        Hub::listing(body.to_vec()).refuses(&[unusable, reason, "HF_ENDPOINT"]);
    }
    Hub::listing(b"[".repeat(1 << 20)).refuses(&[unusable]);
    Hub::listing(br#"{"sha": "x", "siblings": "#.iter().copied().chain(b"[".repeat(1 << 20)).collect())
        .refuses(&[unusable]);
}

#[test]
fn a_commit_is_forty_hexadecimal_digits() {
    for sha in ["", "main", "../../../etc", "0123456789abcdef0123456789abcdef0123456", &"g".repeat(40), &"/".repeat(40)]
    {
        let body = serde_json::json!({ "sha": sha, "siblings": [] }).to_string();
        Hub::listing(body.into_bytes()).refuses(&["names no commit", "HF_ENDPOINT"]);
    }
}

#[test]
fn a_list_without_end_is_not_read_to_its_end() {
    // 17 MiB with their length, and an answer that never ends.
    Hub::listing(b" ".repeat(17 << 20)).refuses(&["gives no usable answer for the repository", "16777216 bytes"]);
    let endless = Hub::new(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        let block = vec![b' '; 1 << 20];
        loop {
            stream.write_all(&block)?;
        }
    });
    endless.refuses(&["gives no usable answer for the repository", "16777216 bytes"]);
}

#[test]
fn redirects_without_end_are_given_up() {
    let hub = Hub::new(|path, stream| {
        write!(stream, "HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: {path}x\r\n\r\n")
    });
    hub.refuses(&["the repository could not be fetched", "redirects", "HF_ENDPOINT"]);
    assert!(hub.requests.load(Ordering::Relaxed) < 30);
    // Of a file alone.
    let hub = Hub::new(|path, stream| match path {
        LISTING => ok(stream, &two_files(4)),
        path => {
            write!(stream, "HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: {path}x\r\n\r\n")
        }
    });
    let text = hub.refuses(&["could not be fetched", "redirects"]);
    assert!(text.contains("config.json") || text.contains("model.safetensors"), "{text}");
    let nowhere =
        Hub::new(|_, stream| stream.write_all(b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"));
    nowhere.refuses(&["the repository"]);
}

#[test]
fn a_file_has_the_length_that_was_announced() {
    for (sent, announced) in [(5, 10), (20, 10), (0, 10)] {
        let hub = Hub::new(move |path, stream| match path {
            LISTING => ok(stream, &two_files(announced)),
            path if path.ends_with("config.json") => ok(stream, b"{}"),
            _ => ok(stream, &vec![b'x'; sent]),
        });
        hub.refuses(&["model.safetensors arrived damaged twice", &format!("{announced} were announced"), "try again"]);
    }
}

#[test]
fn a_file_without_end_is_not_read_to_its_end() {
    let hub = Hub::new(|path, stream| match path {
        LISTING => ok(stream, &two_files(1000)),
        path if path.ends_with("config.json") => ok(stream, b"{}"),
        _ => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            let block = vec![b'x'; 1 << 20];
            loop {
                stream.write_all(&block)?;
            }
        }
    });
    hub.refuses(&["model.safetensors arrived damaged twice", "1000 were announced"]);
    // Nothing of it is kept.
    let blobs = hub.cache.path().join("hub/models--owner--model/blobs");
    let kept: u64 = std::fs::read_dir(blobs).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(kept <= 2, "{kept} bytes");
}

#[test]
fn a_server_that_always_begins_anew_is_given_up() {
    let hub = Hub::new(|path, stream| match path {
        LISTING => ok(stream, &two_files(1000)),
        path if path.ends_with("config.json") => ok(stream, b"{}"),
        // Whatever is asked for, the first hundred bytes of a thousand.
        _ => write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n{}", "x".repeat(100)),
    });
    hub.refuses(&["model.safetensors could not be fetched", "check the network"]);
    assert!(hub.requests.load(Ordering::Relaxed) < 20);
}

#[test]
fn a_page_in_place_of_a_file_is_no_file() {
    let page = b"<!DOCTYPE html><html></html>";
    // The list tells no sizes, as a mirror's.
    let list = serde_json::json!({ "sha": COMMIT, "siblings": [{ "rfilename": "config.json" }, { "rfilename": "model.safetensors" }] });
    let list = list.to_string().into_bytes();
    let hub = Hub::new(move |path, stream| match path {
        LISTING => ok(stream, &list),
        _ => {
            let head = format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: \"0123456789\"\r\nContent-Length: {}\r\n\r\n",
                page.len()
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(page)
        }
    });
    let dir = hub.resolve().unwrap();
    let error = candle_bitnet::checkpoint::Checkpoint::open(&dir).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("not a safetensors file"), "{error}");
    // Without anything that names the content, no file is written.
    let list = two_files(4);
    let list = String::from_utf8(list).unwrap().replace("\"blobId\"", "\"other\"").into_bytes();
    let hub = Hub::new(move |path, stream| match path {
        LISTING => ok(stream, &list),
        _ => ok(stream, page),
    });
    hub.refuses(&["no usable answer", "ETag"]);
}

#[test]
fn names_and_identities_do_not_leave_the_cache() {
    let files = serde_json::json!([
        { "rfilename": "config.json", "size": 2, "blobId": "../../../../evil" },
        { "rfilename": "../model.safetensors", "size": 1, "blobId": "0123456789" },
        { "rfilename": "/tmp/model.safetensors", "size": 1, "blobId": "0123456789" },
        { "rfilename": "a\\..\\model.safetensors", "size": 1, "blobId": "0123456789" },
        { "rfilename": "x\u{1b}[2J.gguf", "size": 1, "blobId": "0123456789" },
        { "rfilename": "../y.gguf", "size": 1, "blobId": "0123456789" },
        { "rfilename": "n".repeat(300) + ".gguf", "size": 1, "blobId": "0123456789" },
    ]);
    let body = serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string();
    let hub = Hub::listing(body.into_bytes());
    hub.refuses(&["holds no safetensors weights and no GGUF file"]);
    let mut found = Vec::new();
    let mut dirs = vec![hub.cache.path().to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { found.push(path) }
        }
    }
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let hub = Hub::new(|_, stream| stream.shutdown(std::net::Shutdown::Both));
    hub.refuses(&["the repository could not be fetched", "check the network"]);
    let hub = Hub::new(|_, stream| stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n"));
    hub.refuses(&["the repository could not be fetched", "check the network"]);
    // Headers without end.
    let hub = Hub::new(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
        loop {
            stream.write_all(b"X-More: and more\r\n")?;
        }
    });
    hub.refuses(&["the repository could not be fetched"]);
}
