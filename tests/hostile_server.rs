//! Completion servers that `compare --against` may meet: good ones, broken ones and ones that mean harm.

use candle_bitnet::bench::{Server, Streamed};
use candle_bitnet::{Error, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A server that lists the models `models` and answers completions as it is told; and the bodies that it was sent.
fn server(models: &'static str, answer: impl Fn(&mut TcpStream) + Send + 'static) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, bodies) = channel();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut request, mut length) = (String::new(), 0);
            reader.read_line(&mut request).unwrap();
            let mut headers = request.clone();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                headers += &line;
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            if request.starts_with("GET /v1/models ") {
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{models}",
                    models.len()
                );
            } else {
                let _ = sender.send(headers + &String::from_utf8(body).unwrap());
                answer(&mut stream);
            }
        }
    });
    (address, bodies)
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";

/// A server that sends these bytes after a good header.
fn streaming(events: impl Into<String>) -> (String, Receiver<String>) {
    let events = events.into();
    server("{}", move |stream| drop(stream.write_all(format!("{OK}{events}").as_bytes())))
}

fn ask(address: &str) -> Result<Streamed> {
    Server::new(address, None, None)?.complete("Hello", 5)
}

/// The error names the server and says so.
fn refuses(address: &str, words: &[&str]) {
    let start = Instant::now();
    let error = ask(address).expect_err(words[0]);
    assert!(start.elapsed() < Duration::from_secs(20), "{error}");
    let text = error.to_string();
    assert!(matches!(error, Error::Unavailable { .. }) && text.starts_with(&format!("server {address} ")), "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
    assert!(text.len() < 700 && !text.contains('\u{1b}'), "{text:?}");
}

const STREAM: &str = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":null}]}\n\n\
    : a comment\n\ndata:{\"choices\":[{\"text\":\" wor\"}]}\r\n\r\n\
    data: {\"choices\":[{\"text\":\"ld\",\"finish_reason\":\"length\"}]}\n\n";

#[test]
fn a_stream_is_timed_and_counted() {
    let (address, bodies) = streaming(format!("{STREAM}data: [DONE]\n\n"));
    let answer = ask(&address).unwrap();
    assert_eq!((answer.text.as_str(), answer.tokens, answer.prompt_tokens), (" world", 2, None));
    assert!(answer.first_token_seconds > 0.0 && answer.seconds >= answer.first_token_seconds, "{answer:?}");
    let body = bodies.recv().unwrap();
    for part in
        ["POST /v1/completions ", "\"prompt\":\"Hello\"", "\"max_tokens\":5", "\"temperature\":0", "\"stream\":true"]
    {
        assert!(body.contains(part), "no {part:?} in {body}");
    }
    assert!(!body.contains("\"model\"") && !body.to_lowercase().contains("authorization"), "{body}");
    // The server's own count is better than that of the pieces; and not all end with [DONE].
    let counted = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":7}}\n\n";
    let (address, _) = streaming(format!("{STREAM}{counted}"));
    let answer = ask(&address).unwrap();
    assert_eq!((answer.tokens, answer.prompt_tokens), (7, Some(3)));
    assert_eq!(answer.tokens_per_second(), Some(6.0 / (answer.seconds - answer.first_token_seconds)));
    assert_eq!(Streamed { tokens: 1, ..answer }.tokens_per_second(), None);
}

#[test]
fn addresses_models_and_keys_are_sent_as_meant() {
    let models = "{\"data\":[{\"id\":\"first:latest\"},{\"id\":\"second\"}]}";
    let answer = |stream: &mut TcpStream| drop(stream.write_all(format!("{OK}{STREAM}").as_bytes()));
    let (address, bodies) = server(models, answer);
    for form in ["", "/", "/v1", "/v1/", "/v1/completions"] {
        let server = Server::new(&format!("{address}{form}"), None, Some("secret".into())).unwrap();
        assert!(!format!("{server:?}").contains("secret"), "{server:?}");
        assert_eq!((server.base(), server.model()), (address.as_str(), Some("first:latest")));
        server.complete("Hello", 5).unwrap();
        let body = bodies.recv().unwrap();
        assert!(body.contains("\"model\":\"first:latest\""), "{body}");
        assert!(body.to_lowercase().contains("authorization: bearer secret\r\n"), "{body}");
    }
    let other = Server::new(&address, Some("second".into()), None).unwrap();
    other.complete("Hello", 5).unwrap();
    assert!(bodies.recv().unwrap().contains("\"model\":\"second\""));
    for bad in ["", "localhost:8080", "ftp://host", "http://", "http://a b", "http://host\n"] {
        let error = Server::new(bad, None, None).unwrap_err();
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains("--against"), "{error}");
    }
}

#[test]
fn what_is_no_stream_of_completions_is_refused() {
    for (events, words) in [
        ("", &["broke off after 0 tokens"][..]),
        ("data: {\"choices\":[{\"text\":\"a\"}]}\n\n", &["broke off after 1 tokens"]),
        ("data: [DONE]\n\n", &["holds no text"]),
        ("data: oops \u{1b}[31m\n\n", &["sends what is no completion", "oops"]),
        ("data: {\"choices\":3}\n\n", &["sends what is no completion"]),
        ("data: {\"error\":{\"message\":\"out of \\u001b memory\"}}\n\n", &["out of", "memory"]),
        ("{\"choices\":[{\"text\":\"all at once\"}]}", &["does not stream", "all at once"]),
        ("<html>hello</html>\n", &["broke off after 0 tokens"]),
    ] {
        refuses(&streaming(events).0, words);
    }
}

#[test]
fn refusals_are_quoted_with_a_remedy() {
    for (status, body, words) in [
        ("404 Not Found", "{\"error\":\"no such model\"}", &["status 404", "no such model", "/v1/completions"][..]),
        ("401 Unauthorized", "key?", &["status 401", "BITNET_API_KEY"]),
        ("302 Found\r\nLocation: http://127.0.0.1:9/", "", &["status 302", "redirects are not followed"]),
        ("500 Internal Server Error", "\u{1b}]0;owned\u{7}", &["status 500", "owned"]),
    ] {
        let (address, _) = server("[]", move |stream| {
            let length = body.len();
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        });
        refuses(&address, words);
    }
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    refuses(&format!("http://{free}"), &["not available"]);
    let (address, _) = server("{}", |stream| drop(stream.write_all(b"SSH-2.0-server\r\n")));
    refuses(&address, &["not available"]);
}

#[test]
fn endless_answers_end() {
    let endless = |line: &'static str| {
        server("{}", move |stream| {
            let _ = stream.write_all(OK.as_bytes());
            let block = line.repeat((1 << 16) / line.len() + 1);
            while stream.write_all(block.as_bytes()).is_ok() {}
        })
        .0
    };
    refuses(&endless("a"), &["bytes"]);
    refuses(&endless("data: {\"choices\":[{\"text\":\"\"}]}\n"), &["bytes"]);
    // A list of models without an end is no list.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(OK.as_bytes());
        while stream.write_all(&[b'['; 4096]).is_ok() {}
    });
    assert_eq!(Server::new(&address, None, None).unwrap().model(), None);
}
