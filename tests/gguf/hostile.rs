//! Files that are damaged or mean harm: each is refused for its own reason, and none for another.

use super::builder::{ARRAY, Builder, TEXT, U32, array, text};
use candle_bitnet::checkpoint::gguf::{Gguf, Header, Value};
use candle_bitnet::checkpoint::limits;
use candle_bitnet::text::Tokenizer;
use candle_bitnet::{Error, Result};
use std::path::Path;

fn parse(bytes: &[u8]) -> Result<Header> {
    Header::parse(Path::new("bad.gguf"), bytes)
}

/// Asserts the error's kind by its text: "file: reason", "file: key: reason" or "file: tensor name: reason".
fn fails(bytes: &[u8], reason: &str) {
    let error = parse(bytes).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("bad.gguf: ") && error.contains(reason), "{reason:?} in {error:?}");
}

/// A small good file.
fn good() -> Builder {
    Builder::new()
        .text("general.architecture", "bitnet-b1.58")
        .u32("a.number", 7)
        .f32("a.float", 0.5)
        .flag("a.flag", true)
        .strings("some.strings", &["one", "", "three"])
        .i32s("some.numbers", &[1, -2, 3])
        .tensor("first", &[3, 32], 0, vec![1; 384])
        .tensor("blocks", &[2, 64], 8, vec![0; 136])
        .tensor("half", &[5], 1, vec![2; 10])
}

/// An entry whose value is nothing but these bytes.
fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    Builder::new().raw("the.key", kind, bytes).build()
}

#[test]
fn a_good_file_is_read() {
    for version in [2, 3] {
        let bytes = Builder { version, ..good() }.build();
        let header = parse(&bytes).unwrap();
        assert_eq!((header.version, header.alignment, header.metadata.len()), (version, 32, 6));
        assert_eq!(header.get("a.number"), Some(&Value::Unsigned(7)));
        assert_eq!(header.get("a.float"), Some(&Value::F32(0.5)));
        assert!(matches!(header.get("some.strings"), Some(Value::Array(a)) if a.len == 3));
        let shapes: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.shape.clone())).collect();
        assert_eq!(shapes, [("first", vec![3, 32]), ("blocks", vec![2, 64]), ("half", vec![5])]);
        let bytes_of = |i: usize| &bytes[header.tensors[i].range.clone()];
        assert_eq!((bytes_of(0), bytes_of(2)), (&[1; 384][..], &[2; 10][..]));
    }
}

#[test]
fn every_type_of_value_is_read() {
    let values: [(u32, &[u8], Value); 11] = [
        (0, &[250], Value::Unsigned(250)),
        (1, &[250], Value::Signed(-6)),
        (2, &[1, 2], Value::Unsigned(513)),
        (3, &[255, 255], Value::Signed(-1)),
        (4, &[0, 0, 0, 128], Value::Unsigned(1 << 31)),
        (5, &[255, 255, 255, 255], Value::Signed(-1)),
        (6, &[0, 0, 0, 63], Value::F32(0.5)),
        (7, &[0], Value::Bool(false)),
        (10, &[255; 8], Value::Unsigned(u64::MAX)),
        (11, &[255; 8], Value::Signed(-1)),
        (12, &[0, 0, 0, 0, 0, 0, 224, 63], Value::F64(0.5)),
    ];
    for (kind, bytes, want) in values {
        let header = parse(&value(kind, bytes)).unwrap();
        assert_eq!(header.get("the.key"), Some(&want));
        // As elements of an array, and of one in an array.
        let inner = array(kind, 2, &[bytes, bytes].concat());
        let nested = array(ARRAY, 2, &[&inner[..], &inner].concat());
        for value in [value(ARRAY, &inner), value(ARRAY, &nested)] {
            assert!(matches!(parse(&value).unwrap().get("the.key"), Some(Value::Array(a)) if a.len == 2));
        }
    }
}

#[test]
fn what_is_no_gguf_file_is_said() {
    fails(b"", "does not begin with GGUF");
    fails(b"GGML\x03\0\0\0", "does not begin with GGUF");
    fails(b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer");
    fails(b"GGUF\x03\0\0", "the header runs past the end");
    let version = |version| Builder { version, ..good() }.build();
    fails(&version(1), "version 1 is not supported");
    fails(&version(4), "version 4");
    fails(&version(0), "version 0");
    fails(&version(3u32.swap_bytes()), "big-endian");
}

#[test]
fn no_cut_and_no_changed_byte_does_harm() {
    let bytes = good().build();
    for len in 0..bytes.len() {
        let error = parse(&bytes[..len]).unwrap_err();
        assert!(matches!(error, Error::File { .. } | Error::Config { .. } | Error::Tensor { .. }), "{len}: {error}");
    }
    for at in 0..bytes.len() {
        for change in [1, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= change;
            if let Ok(header) = parse(&bad) {
                assert!(header.tensors.iter().all(|t| t.range.end <= bad.len()), "byte {at}");
            }
        }
    }
}

#[test]
fn counts_are_believed_only_with_the_bytes_for_them() {
    let counts = |tensors, entries| Builder { counts: Some((tensors, entries)), ..good() }.build();
    fails(&counts(u64::MAX, 1), "tensors");
    fails(&counts(1, u64::MAX), "metadata entries");
    fails(&counts(limits::MAX_TENSORS as u64 + 1, 6), "at most 4096 are accepted");
    fails(&counts(3, limits::MAX_GGUF_METADATA as u64 + 1), "at most 4096 are accepted");
    fails(&counts(4000, 6), "more than its bytes can hold");
    fails(&counts(3, 4000), "more than its bytes can hold");
    for (kind, name) in [(0, "u8"), (4, "u32"), (8, "a string"), (9, "an array"), (12, "f64")] {
        fails(
            &value(ARRAY, &array(kind, u64::MAX, &[0; 64])),
            &format!("the.key: an array of {} values ({name})", u64::MAX),
        );
        fails(&value(ARRAY, &array(kind, 1 << 40, &[0; 64])), "more than the file's bytes can hold");
    }
    fails(&value(TEXT, &u64::MAX.to_le_bytes()), "the.key: runs past the end");
    fails(&value(TEXT, &100u64.to_le_bytes()), "the.key: runs past the end");
    fails(&value(ARRAY, &array(TEXT, 1, &u64::MAX.to_le_bytes())), "the.key: runs past the end");
    let mut key = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
    key.extend(u64::MAX.to_le_bytes());
    key.extend([b'k'; 64]);
    fails(&key, "a metadata key runs past the end");
}

#[test]
fn arrays_are_nested_only_so_deep() {
    let nest = |depth: usize| (1..depth).fold(array(0, 1, &[7]), |inner, _| array(ARRAY, 1, &inner));
    for depth in 1..=limits::MAX_GGUF_ARRAY_DEPTH {
        assert!(parse(&value(ARRAY, &nest(depth))).is_ok(), "{depth}");
    }
    for depth in [limits::MAX_GGUF_ARRAY_DEPTH + 1, 1000, 100_000] {
        fails(&value(ARRAY, &nest(depth)), "the.key: arrays nested deeper than 4");
    }
    // Empty arrays side by side cost their own bytes and no more.
    let wide = array(ARRAY, 50_000, &array(0, 0, &[]).repeat(50_000));
    assert!(parse(&value(ARRAY, &wide)).is_ok());
}

#[test]
fn values_are_what_their_types_say() {
    fails(&value(7, &[2]), "the.key: a bool that is neither 0 nor 1");
    fails(&value(13, &[0; 8]), "the.key: value type 13 does not exist");
    fails(&value(u32::MAX, &[0; 8]), "value type 4294967295 does not exist");
    fails(&value(ARRAY, &array(99, 1, &[0; 8])), "value type 99 does not exist");
    fails(&value(TEXT, &text(&[0xff, 0xfe])), "the.key: not UTF-8");
    fails(&value(U32, &[1, 2]), "the.key: runs past the end");
    let keyed = |key: &[u8]| {
        let mut b = good();
        b.entries[1].0 = key.to_vec();
        b.build()
    };
    fails(&keyed(&[0xc3, 0x28]), "a metadata key is not UTF-8");
    fails(&keyed(b""), "a metadata key has 0 bytes");
    fails(&keyed(&[b'k'; limits::MAX_GGUF_KEY_LENGTH + 1]), "1 to 1024 are accepted");
    fails(&keyed(b"bell\x07"), "control characters");
    fails(&keyed(b"a.float"), "a.float: given twice");
}

#[test]
fn alignments_are_checked() {
    for bad in [0, 1, 4, 7, 24, 1 << 17, u32::MAX] {
        fails(&good().u32("general.alignment", bad).build(), "general.alignment: ");
    }
    fails(&good().text("general.alignment", "32").build(), "general.alignment: a string where a whole number");
    assert_eq!(parse(&good().u32("general.alignment", 16).build()).unwrap().alignment, 16);
    let mut b = good();
    b.tensors[1].offset = Some(400);
    fails(&b.build(), "tensor blocks: offset 400 is not a multiple of the alignment, 32");
}

#[test]
fn tensors_lie_in_the_file_and_apart() {
    let at = |index: usize, offset: u64| {
        let mut b = good();
        b.tensors[index].offset = Some(offset);
        b.build()
    };
    fails(&at(1, 0), "overlap those of tensor");
    fails(&at(1, 352), "tensor blocks: its bytes overlap those of tensor first");
    fails(&at(2, 1 << 20), "tensor half: its bytes 1048576 to 1048586 run past the end");
    fails(
        &at(2, u64::MAX - 31),
        "tensor half: its bytes 18446744073709551584 to 18446744073709551594 run past the end",
    );
    fails(&at(0, u64::MAX - 31), "tensor first: offset 18446744073709551584 and 384 bytes overflow");
    fails(&at(0, (i64::MAX as u64) & !31), "tensor first: its bytes");
    let shaped = |shape: &[u64], kind: u32| good().tensor("half", shape, kind, vec![0; 8]).build();
    fails(&shaped(&[1; 5], 0), "tensor half: 5 dimensions; at most 4");
    fails(&shaped(&[u64::MAX, 2], 0), "overflow");
    fails(&shaped(&[1 << 32, 1 << 32], 36), "overflow");
    fails(&shaped(&[1 << 62], 0), "tensor half: the size of shape");
    fails(&shaped(&[4, 100], 35), "tensor half: rows of 100 values of TQ2_0 are not a multiple of 256");
    fails(&shaped(&[33], 36), "33 values of I2_S are not a multiple of 4");
    fails(&shaped(&[2], 200), "tensor half: type 200 is not supported");
    fails(&shaped(&[2], 38), "TL1 of bitnet.cpp");
    let named = |name: &str| {
        let mut b = good();
        b.tensors[1].name = name.into();
        b.build()
    };
    fails(&named("first"), "tensor first: listed twice");
    fails(&named(""), "a tensor's name has 0 bytes");
    fails(&named(&"n".repeat(257)), "1 to 256 are accepted");
    fails(&named("na\u{7}me"), "not printable ASCII");
}

#[test]
fn metadata_of_the_wrong_type_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |b: &Builder| Gguf::open(&b.write(dir.path())).unwrap();
    let gguf = open(&good());
    for (error, reason) in [
        (gguf.text("a.number").unwrap_err(), "a.number: 7 where a string is expected"),
        (gguf.flag("a.float").unwrap_err(), "a.float: 0.5 where true or false"),
        (gguf.strings("some.numbers").unwrap_err(), "an array of 3 values (i32) where an array of strings"),
        (gguf.numbers("some.strings").unwrap_err(), "an array of 3 values (a string) where an array of numbers"),
        (gguf.strings("general.architecture").unwrap_err(), "\"bitnet-b1.58\" where an array of strings"),
    ] {
        assert!(matches!(error, Error::Config { .. }) && error.to_string().contains(reason), "{error}");
    }
    let strings: Result<Vec<&str>> = gguf.strings("some.strings").unwrap().unwrap().collect();
    assert_eq!(strings.unwrap(), ["one", "", "three"]);
    assert_eq!(gguf.numbers("some.numbers").unwrap().unwrap(), [1.0, -2.0, 3.0]);
    assert!(gguf.text("nothing").unwrap().is_none() && gguf.strings("nothing").unwrap().is_none());
    // A bad string is found when it is read.
    let bad = good().raw("some.strings", ARRAY, &array(TEXT, 2, &[text(b"ok"), text(&[0xff])].concat()));
    let gguf = open(&bad);
    let read: Vec<_> = gguf.strings("some.strings").unwrap().unwrap().collect();
    assert!(read[0].is_ok() && read[1].as_ref().unwrap_err().to_string().contains("not UTF-8"));
}

/// A file with nothing but a tokenizer of this many letters.
pub fn tokenizer_file(tokens: &[&str], merges: &[&str]) -> Builder {
    Builder::new()
        .text("general.architecture", "bitnet-b1.58")
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "llama-bpe")
        .strings("tokenizer.ggml.tokens", tokens)
        .strings("tokenizer.ggml.merges", merges)
}

#[test]
fn tokenizers_that_contradict_themselves_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |b: &Builder, reason: &str| {
        let error = Tokenizer::open(&(&b.write(dir.path())).into()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("test.gguf: ") && error.contains(reason), "{reason:?} in {error:?}");
    };
    let good = tokenizer_file(&["a", "b", "ab", "<s>"], &["a b"]);
    assert!(Tokenizer::open(&(&good.write(dir.path())).into()).is_ok());
    fails(&good.clone().without("tokenizer.ggml.model"), "tokenizer.ggml.model: missing");
    fails(&good.clone().text("tokenizer.ggml.model", "rwkv"), "\"rwkv\" is not supported");
    fails(&good.clone().without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens: missing");
    fails(&good.clone().without("tokenizer.ggml.merges"), "tokenizer.ggml.merges: missing");
    fails(&good.clone().u32("tokenizer.ggml.tokens", 3), "tokenizer.ggml.tokens: 3 where an array of strings");
    fails(&good.clone().text("tokenizer.ggml.pre", "mystery"), "tokenizer.ggml.pre: \"mystery\"");
    fails(&good.clone().strings("tokenizer.ggml.merges", &["ab"]), "\"ab\" are not two tokens");
    fails(&good.clone().strings("tokenizer.ggml.merges", &["a "]), "are not two tokens");
    fails(&good.clone().strings("tokenizer.ggml.merges", &["a z"]), "tokenizer.ggml.merges: ");
    fails(&good.clone().strings("tokenizer.ggml.tokens", &["a", "b", "ab", "a"]), "0 and 3 are both \"a\"");
    fails(&good.clone().i32s("tokenizer.ggml.token_type", &[1, 1]), "2 types for 4 tokens");
    fails(&good.clone().i32s("tokenizer.ggml.token_type", &[1, 1, 1, 9]), "9 is no type of token");
    fails(&good.clone().u32("tokenizer.ggml.bos_token_id", 4), "4 is said to be a special one");
    fails(&good.clone().u32("tokenizer.ggml.eot_token_id", 400), "400 is said to be a special one");
    fails(&good.clone().text("tokenizer.ggml.eos_token_id", "3"), "tokenizer.ggml.eos_token_id: \"3\" where");
    fails(&good.clone().text("tokenizer.ggml.model", "llama"), "tokenizer.ggml.scores: missing");
    let scored = good.clone().text("tokenizer.ggml.model", "llama");
    fails(&scored.clone().f32s("tokenizer.ggml.scores", &[0.0]), "1 scores for 4 tokens");
    fails(&scored.f32s("tokenizer.ggml.scores", &[0.0, f32::NAN, 0.0, 0.0]), "score");
}
