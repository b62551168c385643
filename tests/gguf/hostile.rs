//! Files that are damaged or mean harm: each is refused for its own reason, and none for another.

use super::builder::{ARRAY, Builder, TEXT, U32, array, text};
use candle_bitnet::checkpoint::gguf::{Gguf, Header, Value};
use candle_bitnet::checkpoint::limits;
use candle_bitnet::checkpoint::{Checkpoint, ScaleStyle};
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
    for depth in [limits::MAX_GGUF_ARRAY_DEPTH + 1, 1000, 10_000] {
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

#[test]
fn a_file_that_ends_early_says_where() {
    let bytes = good().build();
    let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    let (key, float) = (find(b"a.flag"), find(b"a.float") + b"a.float".len());
    let (string, number) = (find(b"three"), find(b"some.numbers") + b"some.numbers".len());
    let name = find(b"blocks");
    for (len, words) in [
        (2, "does not begin with GGUF"),
        (10, "the header runs past the end of the file (10 bytes): truncated?"),
        (24, "lists 6 metadata entries, more than its bytes can hold: damaged or truncated"),
        (key - 4, "a metadata key runs past the end"),
        (key + 3, "a metadata key runs past the end"),
        (float + 2, "a.float: runs past the end of the file: truncated?"),
        (float + 4 + 3, "a.float: runs past the end of the file: truncated?"),
        (string + 2, "some.strings: runs past the end of the file: truncated?"),
        (number + 4 + 4, "some.numbers: runs past the end of the file: truncated?"),
        (number + 4 + 12 + 8, "some.numbers: an array of 3 values (i32), more than the file's bytes can hold"),
        (name - 4, "a tensor's name runs past the end"),
        (name + 3, "a tensor's name runs past the end"),
        (name + 6 + 2, "tensor blocks: runs past the end of the file: truncated?"),
        (name + 6 + 4 + 5, "tensor blocks: runs past the end of the file: truncated?"),
        (name + 6 + 4 + 16 + 4, "tensor blocks: runs past the end of the file: truncated?"),
        (bytes.len() - 1, "tensor half: its bytes 544 to 554 run past the end of the file"),
        (bytes.len() - 100, "tensor blocks: its bytes 384 to 520 run past the end of the file"),
    ] {
        fails(&bytes[..len], words);
    }
    let parsed = parse(&bytes).unwrap();
    fails(&bytes[..parsed.data_start - 1], "ends before its tensors");
    fails(
        &bytes[..parsed.data_start],
        "tensor first: its bytes 0 to 384 run past the end of the file (0 bytes of data)",
    );
}

/// A model of one weight that its type's reader gets to see.
fn weight(kind: u32, bytes: Vec<u8>) -> Builder {
    let arch = |key: &str| format!("bitnet-b1.58.{key}");
    Builder::new()
        .text("general.architecture", "bitnet-b1.58")
        .u32(&arch("context_length"), 64)
        .u32(&arch("embedding_length"), 256)
        .u32(&arch("block_count"), 1)
        .u32(&arch("feed_forward_length"), 256)
        .u32(&arch("attention.head_count"), 2)
        .f32(&arch("attention.layer_norm_rms_epsilon"), 1e-5)
        .tensor("token_embd.weight", &[4, 256], 0, vec![0; 4096])
        .tensor("blk.0.attn_q.weight", &[4, 256], kind, bytes)
}

#[test]
fn weights_that_no_model_has_are_refused_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let read = |b: &Builder| {
        let checkpoint = Checkpoint::open(&b.write(dir.path())).unwrap();
        checkpoint.linear("model.layers.0.self_attn.q_proj", 4, 256, ScaleStyle::Multiply)
    };
    let fails = |b: &Builder, reason: &str| {
        let error = read(b).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("test.gguf: tensor blk.0.attn_q.") && error.contains(reason), "{reason:?} in {error:?}");
    };
    let i2s = |code: u8, scale: f32| weight(36, [vec![code; 256], scale.to_le_bytes().to_vec(), vec![0; 28]].concat());
    // 0x19 holds the codes 0, 1, 2, 1.
    assert!(read(&i2s(0x19, 0.5)).is_ok());
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40] {
        fails(&i2s(0x19, scale), "weight: I2_S: ");
        fails(&i2s(0x19, scale), "is no scale: it must be positive, finite and not denormal");
    }
    fails(&i2s(0x1b, 0.5), "256 of 1024 codes (25.00 %) are 3");
    fails(&i2s(0xff, 0.5), "are 3, which no weight has");
    // One sign and nothing else: a hole in the file.
    fails(&i2s(0x00, 0.5), "weight: ");
    let blocks = |kind, block: &[u8], ds: [f32; 4]| {
        let d = |d: f32| half::f16::from_f32(d).to_le_bytes();
        weight(kind, ds.iter().flat_map(|v| [block, &d(*v)].concat()).collect())
    };
    for (kind, name, codes) in [(35, "TQ2_0", &[0x19; 64][..]), (34, "TQ1_0", &[0x3c; 52])] {
        assert!(read(&blocks(kind, codes, [0.5, 0.5, 0.0, 0.5])).is_ok());
        for d in [-1.0, f32::NAN, f32::INFINITY] {
            fails(&blocks(kind, codes, [d, 0.5, 0.5, 0.5]), &format!("{name}: block 0 has scale"));
            fails(&blocks(kind, codes, [0.5, 0.5, d, 0.5]), &format!("{name}: block 0 has scale 0.5, block 2"));
        }
    }
    fails(&blocks(35, &[0x1b; 64], [0.5; 4]), "invalid ternary code 3 at row 0, column");
    // A scale of its own, which multiplies the other.
    let good = i2s(0x19, 0.5);
    for (scale, reason) in [
        (f32::NAN, "NaN is no scale"),
        (0.0, "0 is no scale"),
        (-2.0, "-2 is no scale"),
        (f32::INFINITY, "inf is no scale"),
    ] {
        fails(&good.clone().tensor("blk.0.attn_q.scale", &[1], 0, scale.to_le_bytes().to_vec()), reason);
    }
    let tiny = i2s(0x19, 1e-30).tensor("blk.0.attn_q.scale", &[1], 0, 1e-30f32.to_le_bytes().to_vec());
    fails(&tiny, "together with the weight's own scale it gives 0, which is no scale");
    fails(&good.clone().tensor("blk.0.attn_q.scale", &[2], 0, vec![0; 8]), "shape [2] where one number is expected");
    fails(&good.clone().tensor("blk.0.attn_q.scale", &[1], 26, vec![1; 4]), "I32");
}

#[test]
fn texts_of_a_tokenizer_are_utf8_and_its_numbers_fit() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |b: &Builder, reason: &str| {
        let error = Tokenizer::open(&(&b.write(dir.path())).into()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("test.gguf: ") && error.contains(reason), "{reason:?} in {error:?}");
    };
    let tokens = |last: &[u8]| array(TEXT, 2, &[text(b"a"), text(last)].concat());
    let good = tokenizer_file(&["a", "b", "ab", "<s>"], &["a b"]);
    fails(
        &good.clone().raw("tokenizer.ggml.tokens", ARRAY, &tokens(b"\xff")),
        "tokenizer.ggml.tokens: a string that is",
    );
    fails(&good.clone().raw("tokenizer.ggml.merges", ARRAY, &tokens(b"a \xc3")), "tokenizer.ggml.merges: ");
    fails(&good.clone().raw("tokenizer.ggml.model", TEXT, &text(b"\xff")), "tokenizer.ggml.model: not UTF-8");
    fails(&good.clone().raw("tokenizer.ggml.pre", TEXT, &text(b"\xff")), "tokenizer.ggml.pre: not UTF-8");
    fails(&good.clone().f32s("tokenizer.ggml.tokens", &[1.0]), "where an array of strings");
    fails(&good.clone().strings("tokenizer.ggml.token_type", &["1"; 4]), "token_type: an array of 4 values (a string)");
    fails(&good.clone().f32s("tokenizer.ggml.token_type", &[f32::NAN; 4]), "NaN is no type of token");
    fails(&good.clone().f32s("tokenizer.ggml.token_type", &[1.5; 4]), "1.5 is no type of token");
    fails(&good.clone().i32s("tokenizer.ggml.token_type", &[-1; 4]), "-1 is no type of token");
    fails(&good.clone().u32("tokenizer.ggml.add_bos_token", 1), "add_bos_token: 1 where true or false");
    let bos = good.clone().raw("tokenizer.ggml.bos_token_id", 11, &(-7i64).to_le_bytes());
    fails(&bos, "tokenizer.ggml.bos_token_id: -7 where");
    let empty = tokenizer_file(&["a", ""], &[]).i32s("tokenizer.ggml.token_type", &[1, 3]);
    fails(&empty, "special token 1 is empty");
    // A list of nothing, which the library could only fail on later.
    fails(&good.clone().strings::<&str>("tokenizer.ggml.tokens", &[]), "tokenizer.ggml.");
    fails(&good.clone().strings("tokenizer.ggml.merges", &["a b", "ab c"]), "tokenizer.ggml.merges: ");
    let sentences = |b: &Builder| b.clone().text("tokenizer.ggml.model", "llama");
    let scored = sentences(&good).f32s("tokenizer.ggml.scores", &[0.0; 4]);
    fails(&scored, "no piece stands for unknown text");
    fails(&scored.clone().strings("tokenizer.ggml.scores", &["0"; 4]), "scores: an array of 4 values (a string)");
    let typed = scored.i32s("tokenizer.ggml.token_type", &[1, 1, 1, 2]);
    assert!(Tokenizer::open(&(&typed.write(dir.path())).into()).is_ok());
    fails(&typed.clone().u32("tokenizer.ggml.bos_token_id", 4), "bos is 4, but there is no such token");
    fails(&typed.clone().strings("tokenizer.ggml.tokens", &["a", "b", "a", "<s>"]), "the same as piece 0");
    fails(&typed.clone().strings("tokenizer.ggml.tokens", &["a", "b", "", "<s>"]), "0 bytes where 1 to 256");
    fails(&typed.clone().i32s("tokenizer.ggml.token_type", &[6, 1, 1, 2]), "a byte is spelt like <0x0A>");
    fails(&typed.raw("tokenizer.ggml.precompiled_charsmap", ARRAY, &array(0, 3, &[1, 2, 3])), "cut off");
}
