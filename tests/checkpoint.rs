//! Checkpoints: what the fixtures hold, and hostile files, each refused by name, quickly, and without allocating
//! more than the files' size plus 1 MiB.

use candle_bitnet::backend::DenseType;
use candle_bitnet::checkpoint::{Checkpoint, LinearWeight, ScaleStyle, StoredType, limits};
use candle_bitnet::ternary::{PackedTernary, Scale};
use candle_bitnet::{Error, Result};
use half::{bf16, f16};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Counts the bytes that each thread holds, so that tests can run beside each other.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: passes everything on to the system's allocator. A reallocation counts both blocks, as the worst case.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that `f` held at once.
fn peak_of<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = f();
    (result, (PEAK.get() - before) as usize)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A safetensors file of this header and so many bytes of data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A directory with an empty configuration and these files.
fn dir(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open_bytes(bytes: &[u8]) -> (TempDir, Result<Checkpoint>) {
    let dir = dir(&[("model.safetensors", bytes)]);
    let opened = Checkpoint::open(dir.path());
    (dir, opened)
}

fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries.filter_map(|e| e.ok()?.path().metadata().ok()).map(|m| m.len()).sum()
}

/// Opening must fail, naming `culprit` and `reason`, within the promised time and memory.
fn assert_refused(dir: &Path, culprit: &str, reason: &str) {
    let start = Instant::now();
    let (result, peak) = peak_of(|| Checkpoint::open(dir));
    let elapsed = start.elapsed();
    let err = result.expect_err(reason);
    let text = err.to_string();
    assert!(text.contains(culprit) && text.contains(reason), "expected {culprit:?} and {reason:?} in: {text}");
    assert!(text.len() < 1000, "{} bytes of message", text.len());
    assert!(matches!(err, Error::Io { .. } | Error::File { .. } | Error::Tensor { .. }), "{err:?}");
    assert!(peak as u64 <= size_of(dir) + (1 << 20), "{reason}: {peak} bytes held");
    assert!(elapsed < Duration::from_secs(2), "{reason}: {elapsed:?}");
}

#[test]
fn fixtures_open_with_all_their_tensors() {
    let a1 = Checkpoint::open(&fixture("a1_packed")).unwrap();
    assert_eq!((a1.tensors().len(), a1.files().len()), (38, 1));
    assert!(a1.config().1.contains("BitNetForCausalLM") && a1.config().0.ends_with("config.json"));
    let info = a1.tensor("model.layers.1.mlp.down_proj.weight").unwrap().info.clone();
    assert_eq!((info.dtype, &info.shape[..]), (StoredType::U8, &[32, 344][..]));

    let a2 = Checkpoint::open(&fixture("a2_packed_gqa_untied_sharded")).unwrap();
    assert_eq!((a2.tensors().len(), a2.files().len()), (57, 3));
    assert!(a2.names().is_sorted() && a2.contains("lm_head.weight") && !a2.contains("lm_head"));
    // The code and the scale of this projection are in different shards.
    let v = a2.linear("model.layers.0.self_attn.v_proj", 64, 256, ScaleStyle::Multiply).unwrap();
    let LinearWeight::Ternary(v) = v else { panic!("dense") };
    assert_eq!((v.rows(), v.cols(), v.histogram().iter().sum::<usize>()), (64, 256, 64 * 256));
    let divided = Checkpoint::open(&fixture("a3_llama")).unwrap();
    let o = divided.linear("model.layers.0.self_attn.o_proj", 256, 256, ScaleStyle::Divide).unwrap();
    assert!(matches!(o, LinearWeight::Ternary(w) if matches!(w.scale(), Scale::Divide(s) if s > 1.0)));
}

#[test]
fn packed_codes_are_the_quantised_masters() {
    let (packed, masters) = (fixture("a1_packed"), fixture("a1_bf16"));
    let (packed, masters) = (Checkpoint::open(&packed).unwrap(), Checkpoint::open(&masters).unwrap());
    for base in ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"] {
        let LinearWeight::Ternary(p) = packed.linear(base, 344, 128, ScaleStyle::Multiply).unwrap() else { panic!() };
        let LinearWeight::Dense(m) = masters.linear(base, 344, 128, ScaleStyle::Multiply).unwrap() else { panic!() };
        assert_eq!((m.dtype, m.rows, m.cols, m.bytes().len()), (DenseType::BF16, 344, 128, 344 * 128 * 2));
        let q = PackedTernary::quantize_slice(344, 128, &m.to_f32()).unwrap();
        assert_eq!(p.codes(), q.codes());
        assert!((p.scale().multiplier() / q.scale().multiplier() - 1.0).abs() < 0.01, "the file's is rounded to bf16");
    }
}

#[test]
fn any_one_safetensors_file_will_do_but_not_two() {
    let weights = std::fs::read(fixture("a1_packed").join("model.safetensors")).unwrap();
    let one = dir(&[("other.safetensors", &weights)]);
    assert_eq!(Checkpoint::open(one.path()).unwrap().tensors().len(), 38);
    let two = dir(&[("a.safetensors", &weights), ("b.safetensors", &weights)]);
    assert_refused(two.path(), "", "several *.safetensors");
    assert_refused(dir(&[]).path(), "", "no weights");
    assert_refused(&one.path().join("config.json"), "config.json", "not a directory");
    assert_refused(&one.path().join("nowhere"), "nowhere", "");
    let bare = tempfile::tempdir().unwrap();
    assert_refused(bare.path(), "config.json", "");
    std::fs::write(bare.path().join("config.json"), vec![b' '; limits::MAX_CONFIG_SIZE as usize + 1]).unwrap();
    assert_refused(bare.path(), "config.json", "at most");
    std::fs::write(bare.path().join("config.json"), b"\xff").unwrap();
    assert_refused(bare.path(), "config.json", "UTF-8");
}

/// Four bytes of data under an entry's text.
fn entry(text: &str) -> Vec<u8> {
    file(&format!(r#"{{"w": {text}}}"#), &[0; 4])
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let good = r#""w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}"#;
    let deep = "[".repeat(1 << 20);
    let long = "n".repeat(limits::MAX_NAME_LENGTH + 1);
    let tiny = r#"{"dtype":"U8","shape":[0,1,1,1],"data_offsets":[0,0]}"#;
    let many = |n: usize| (0..n).map(|i| format!("\"{i}\":{tiny}")).collect::<Vec<_>>().join(",");
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "empty"),
        (vec![1, 2, 3], "too few"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git lfs pull"),
        (b"<!DOCTYPE html><html></html>".to_vec(), "not a safetensors file"),
        (u64::MAX.to_le_bytes().to_vec(), "claims a header of 18446744073709551615"),
        ((limits::MAX_HEADER_SIZE as u64 + 1).to_le_bytes().to_vec(), "claims a header"),
        ((limits::MAX_HEADER_SIZE as u64).to_le_bytes().to_vec(), "past the end"),
        ([&9u64.to_le_bytes()[..], b"{}"].concat(), "past the end"),
        (file("", &[]), "header: EOF"),
        (file("{}", &[]), "no tensors"),
        (file("{}", &[0; 3]), "3 bytes at the end"),
        (file("[]", &[]), "an object of tensors"),
        (file("{} {}", &[]), "trailing"),
        (file(r#"{"w": "#, &[]), "EOF"),
        (file("{\"w\u{7f}\": 1}", &[]), "printable"),
        (file(&deep, &[]), "header"),
        (file(&format!("{{\"__metadata__\": {deep}"), &[]), "EOF"),
        (file(&format!("{{\"w\": {deep}"), &[]), "EOF"),
        (file(&format!("{{{good}, {good}}}"), &[0; 4]), "twice"),
        (file(&format!("{{\"\": {}}}", &good[5..]), &[0; 4]), "name has 0 bytes"),
        (file(&format!("{{\"{long}\": {}}}", &good[5..]), &[0; 4]), "257 bytes"),
        (file(&format!("{{\"a b\": {}}}", &good[5..]), &[0; 4]), "not printable"),
        (file(&format!("{{\"\\u0077\": {}}}", &good[5..]), &[0; 4]), "escape"),
        (file(&format!("{{\"\u{202e}w\": {}}}", &good[5..]), &[0; 4]), "not printable"),
        (file(&format!("{{{}}}", many(limits::MAX_TENSORS + 1)), &[]), "4097 tensors"),
        (file(&format!("{{{}}}", many(limits::MAX_TENSORS)), &[0]), "1 bytes at the end"),
        (entry("7"), "tensor w: invalid type"),
        (entry("{}"), "tensor w: missing field `dtype`"),
        (entry(r#"{"dtype": "F32", "shape": [1]}"#), "tensor w: missing field `data_offsets`"),
        (entry(r#"{"dtype": "F32", "dtype": "F32"}"#), "tensor w: duplicate field"),
        (entry(r#"{"dtype": "Q4_0", "shape": [1], "data_offsets": [0, 4]}"#), "tensor w: unsupported dtype \"Q4_0\""),
        (entry(r#"{"dtype": 3, "shape": [1], "data_offsets": [0, 4]}"#), "tensor w: invalid type"),
        (entry(r#"{"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}"#), "tensor w: invalid value"),
        (entry(r#"{"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}"#), "tensor w: invalid type"),
        (entry(r#"{"dtype": "F32", "shape": [1,1,1,1,1], "data_offsets": [0, 4]}"#), "tensor w: a list has more"),
        (entry(r#"{"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}"#), "needs 8 bytes"),
        (entry(r#"{"dtype": "F32", "shape": [0], "data_offsets": [0, 4]}"#), "needs 0 bytes"),
        (entry(r#"{"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}"#), "overflows"),
        (entry(r#"{"dtype": "F64", "shape": [2305843009213693952], "data_offsets": [0, 0]}"#), "overflows"),
        (entry(r#"{"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}"#), "tensor w: invalid"),
        (entry(r#"{"dtype": "F32", "shape": [1], "data_offsets": [0]}"#), "two numbers"),
        (entry(r#"{"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}"#), "a list has more"),
        (entry(r#"{"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}"#), "end before they begin"),
        (entry(r#"{"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}"#), "past the end of the file"),
        (
            entry(r#"{"dtype": "U8", "shape": [1], "data_offsets": [18446744073709551614, 18446744073709551615]}"#),
            "past the end",
        ),
        (
            entry(r#"{"dtype": "U8", "shape": [18446744073709551615], "data_offsets": [0, 18446744073709551615]}"#),
            "past the end",
        ),
        (entry(r#"{"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}"#), "1 bytes before it"),
        (entry(r#"{"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}"#), "1 bytes at the end"),
        (
            file(
                r#"{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}"#,
                &[0; 4],
            ),
            "tensor b: its bytes overlap those of tensor a",
        ),
    ];
    for (bytes, reason) in cases {
        let (dir, opened) = open_bytes(&bytes);
        drop(opened);
        assert_refused(dir.path(), "model.safetensors", reason);
    }
}

#[test]
fn the_largest_legal_header_stays_within_its_allowance() {
    let tiny = r#"{"dtype":"U8","shape":[0,1,1,1],"data_offsets":[0,0]}"#;
    let entries: Vec<_> = (0..limits::MAX_TENSORS).map(|i| format!("\"{i}\":{tiny}")).collect();
    let bytes = file(&format!("{{{}}}", entries.join(",")), &[]);
    let dir = dir(&[("model.safetensors", &bytes)]);
    let (opened, peak) = peak_of(|| Checkpoint::open(dir.path()));
    assert_eq!(opened.unwrap().tensors().len(), limits::MAX_TENSORS);
    assert!(peak as u64 <= size_of(dir.path()) + (1 << 20), "{peak} bytes held for {}", bytes.len());

    for shards in [1, 2, 3, 16, 256] {
        let name = |shard: usize| format!("{shard}.safetensors");
        let map: Vec<_> = (0..limits::MAX_TENSORS).map(|i| format!("\"{i}\":{:?}", name(i % shards))).collect();
        let index = format!("{{\"weight_map\":{{{}}}}}", map.join(","));
        let dir = self::dir(&[("model.safetensors.index.json", index.as_bytes())]);
        for shard in 0..shards {
            let entries: Vec<_> = entries.iter().skip(shard).step_by(shards).cloned().collect();
            std::fs::write(dir.path().join(name(shard)), file(&format!("{{{}}}", entries.join(",")), &[])).unwrap();
        }
        let (opened, peak) = peak_of(|| Checkpoint::open(dir.path()));
        assert_eq!(opened.unwrap().tensors().len(), limits::MAX_TENSORS);
        assert!(peak as u64 <= size_of(dir.path()) + (1 << 20), "{shards} shards: {peak} bytes held");
    }
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let whole = std::fs::read(fixture("a1_packed").join("model.safetensors")).unwrap();
    let dir = dir(&[]);
    let path = dir.path().join("model.safetensors");
    for end in (0..whole.len()).step_by(997).chain([1, 7, 8, 9, 3951, 3952, 3953, whole.len() - 1]) {
        std::fs::write(&path, &whole[..end]).unwrap();
        assert_refused(dir.path(), "model.safetensors", "");
    }
    std::fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    assert_refused(dir.path(), "model.safetensors", "1 bytes at the end");
}

#[test]
fn corrupted_bytes_never_panic() {
    let whole = std::fs::read(fixture("a1_packed").join("model.safetensors")).unwrap();
    let mut state = 1u64;
    for _ in 0..3000 {
        let mut bytes = whole[..4096.min(whole.len())].to_vec();
        for _ in 0..3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % 3952;
            bytes[at] = (state >> 20) as u8;
        }
        let _ = candle_bitnet::checkpoint::header::parse(Path::new("f"), &bytes);
    }
}

#[test]
#[cfg(unix)]
fn what_is_not_a_file_is_refused() {
    let directory = dir(&[]);
    std::fs::create_dir(directory.path().join("model.safetensors")).unwrap();
    assert_refused(directory.path(), "model.safetensors", "not a regular file");

    let link = dir(&[]);
    std::os::unix::fs::symlink("gone", link.path().join("model.safetensors")).unwrap();
    assert_refused(link.path(), "model.safetensors", "a link to a file that does not exist");

    let own = dir(&[]);
    std::os::unix::fs::symlink("model.safetensors", own.path().join("model.safetensors")).unwrap();
    assert_refused(own.path(), "model.safetensors", "");

    let device = dir(&[]);
    std::os::unix::fs::symlink("/dev/zero", device.path().join("model.safetensors")).unwrap();
    assert_refused(device.path(), "model.safetensors", "not a regular file");

    let config = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/zero", config.path().join("config.json")).unwrap();
    assert_refused(config.path(), "config.json", "not a regular file");

    // A link into a blob store is how the hub's cache looks.
    let hub = dir(&[]);
    std::os::unix::fs::symlink(fixture("a1_packed").join("model.safetensors"), hub.path().join("model.safetensors"))
        .unwrap();
    assert_eq!(Checkpoint::open(hub.path()).unwrap().tensors().len(), 38);
}

#[test]
fn hostile_indexes_are_refused_by_name() {
    const INDEX: &str = "model.safetensors.index.json";
    let shard =
        |name: &str| file(&format!(r#"{{"{name}": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}"#), &[0]);
    let (a, b) = (shard("a"), shard("b"));
    let deep = format!("{{\"metadata\": {}", "[".repeat(1 << 20));
    let many = (0..=limits::MAX_TENSORS).map(|i| format!("\"{i}\":\"s.safetensors\"")).collect::<Vec<_>>().join(",");
    let shards = (0..=limits::MAX_SHARDS).map(|i| format!("\"{i}\":\"{i}.safetensors\"")).collect::<Vec<_>>().join(",");
    let map = |text: &str| format!("{{\"weight_map\": {{{text}}}}}");
    let cases: Vec<(String, &str, &str)> = vec![
        (String::new(), INDEX, "empty"),
        ("[]".into(), INDEX, "weight_map"),
        ("{}".into(), INDEX, "no weight_map"),
        (map(""), INDEX, "empty"),
        (deep, INDEX, "EOF"),
        (r#"{"weight_map": [1]}"#.into(), INDEX, "invalid type"),
        (r#"{"weight_map": {"a": 1}}"#.into(), INDEX, "invalid type"),
        (r#"{"weight_map": {"a": "a.safetensors"}, "weight_map": {"a": "a.safetensors"}}"#.into(), INDEX, "duplicate"),
        (map(r#""a": "../a.safetensors""#), INDEX, "tensor a: shard \"../a.safetensors\""),
        (map(r#""a": "/etc/a.safetensors""#), INDEX, "plain"),
        (map(r#""a": "sub/a.safetensors""#), INDEX, "plain"),
        (map(r#""a": "c:\\a.safetensors""#), INDEX, "escape"),
        (map(r#""a": "..safetensors""#), INDEX, "plain"),
        (map(r#""a": "config.json""#), INDEX, "plain"),
        (map(r#""a": "model.safetensors.index.json""#), INDEX, "plain"),
        (map(r#""a": """#), INDEX, "plain"),
        (map(r#""a": "a.safetensors", "a": "b.safetensors""#), INDEX, "tensor a: listed twice"),
        (map(r#""a": "gone.safetensors""#), "gone.safetensors", ""),
        (map(r#""a": "a.safetensors", "x": "a.safetensors""#), "a.safetensors", "tensor x: not in this shard"),
        (map(r#""a": "a.safetensors", "b": "a.safetensors""#), "a.safetensors", "tensor b: not in this shard"),
        (map(r#""a": "a.safetensors", "b": "a2.safetensors""#), "a2.safetensors", "tensor a: also in"),
        (map(&many), INDEX, "more than 4096"),
        (map(&shards), INDEX, "1024 shards"),
        (" ".repeat(limits::MAX_INDEX_SIZE + 1), INDEX, "at most"),
    ];
    for (index, culprit, reason) in cases {
        let dir =
            dir(&[(INDEX, index.as_bytes()), ("a.safetensors", &a), ("a2.safetensors", &a), ("b.safetensors", &b)]);
        assert_refused(dir.path(), culprit, reason);
    }
    let good = map(r#""a": "a.safetensors", "b": "b.safetensors""#);
    let dir = dir(&[(INDEX, good.as_bytes()), ("a.safetensors", &a), ("b.safetensors", &b)]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["a", "b"]);
}

/// A checkpoint of these tensors, in this order, back to back.
fn checkpoint(tensors: &[(&str, &str, &str, Vec<u8>)]) -> (TempDir, Checkpoint) {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let (begin, end) = (data.len(), data.len() + bytes.len());
        entries
            .push(format!(r#""{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{begin}, {end}]}}"#));
        data.extend(bytes);
    }
    let dir = dir(&[("model.safetensors", &file(&format!("{{{}}}", entries.join(", ")), &data))]);
    let opened = Checkpoint::open(dir.path()).unwrap();
    (dir, opened)
}

fn bf(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
}

fn tensor_error(err: Error) -> (String, String) {
    match err {
        Error::Tensor { file, tensor, reason } => {
            assert!(file.ends_with("model.safetensors"), "{}", file.display());
            (tensor, reason)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn vectors_are_widened_and_checked() {
    let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    let (_dir, c) = checkpoint(&[
        ("odd", "U8", "[1]", vec![0]),
        ("bf", "BF16", "[2]", bf(&[1.5, -2.0])),
        ("half", "F16", "[2]", halves),
        ("single", "F32", "[2]", [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("nan", "BF16", "[2]", bf(&[1.0, f32::NAN])),
        ("inf", "F32", "[1]", f32::INFINITY.to_le_bytes().to_vec()),
        ("ints", "I64", "[2]", vec![0; 16]),
    ]);
    for name in ["bf", "half", "single"] {
        assert_eq!(c.vector(name, 2).unwrap(), [1.5, -2.0]);
    }
    for (name, len, reason) in
        [("nan", 2, "value 1 is NaN"), ("inf", 1, "inf"), ("ints", 2, "I64"), ("bf", 3, "[3]"), ("gone", 1, "missing")]
    {
        let (tensor, why) = tensor_error(c.vector(name, len).unwrap_err());
        assert!(tensor == name && why.contains(reason), "{tensor}: {why}");
    }
}

#[test]
fn dense_matrices_read_right_at_any_alignment() {
    let values = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let single = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let (_dir, c) = checkpoint(&[
        ("even", "BF16", "[2, 3]", bf(&values)),
        ("odd", "U8", "[1]", vec![0]),
        ("bf", "BF16", "[2, 3]", bf(&values)),
        ("f32", "F32", "[2, 3]", single(&values)),
        ("f32.again", "F32", "[2, 3]", single(&values)),
    ]);
    for name in ["even", "bf", "f32", "f32.again"] {
        let view = c.dense(name, 2, 3).unwrap();
        assert_eq!((view.to_f32(), view.bytes().len()), (values.to_vec(), 6 * view.dtype.size()), "{name}");
        assert_eq!(view.clone().row(1), &view.bytes()[3 * view.dtype.size()..]);
        assert!(view.row(2).is_empty() && view.row(usize::MAX).is_empty());
        view.release();
        assert_eq!(view.to_f32(), values, "released pages come back");
    }
    for (name, rows, cols, reason) in [("bf", 3, 2, "[3, 2]"), ("odd", 1, 1, "U8"), ("gone", 1, 1, "missing")] {
        let (tensor, why) = tensor_error(c.dense(name, rows, cols).unwrap_err());
        assert!(tensor == name && why.contains(reason), "{tensor}: {why}");
    }
}

#[test]
fn bad_linears_are_refused_by_place() {
    let u8s = |name: &'static str, bytes: [u8; 6]| (name, "U8", "[2, 3]", bytes.to_vec());
    let scale = |name: &'static str, s: f32| (name, "BF16", "[1]", bf(&[s]));
    let (_dir, c) = checkpoint(&[
        u8s("ok.weight", [0x55; 6]),
        ("ok.weight_scale", "F32", "[]", 0.5f32.to_le_bytes().to_vec()),
        u8s("three.weight", [0x55, 0x55, 0x55, 0x55, 0x55, 0xd5]),
        scale("three.weight_scale", 1.0),
        u8s("unscaled.weight", [0; 6]),
        u8s("zero.weight", [0; 6]),
        scale("zero.weight_scale", 0.0),
        u8s("negative.weight", [0; 6]),
        scale("negative.weight_scale", -1.0),
        u8s("nan.weight", [0; 6]),
        scale("nan.weight_scale", f32::NAN),
        u8s("inf.weight", [0; 6]),
        scale("inf.weight_scale", f32::INFINITY),
        u8s("tiny.weight", [0; 6]),
        scale("tiny.weight_scale", 1e-40),
        u8s("two.weight", [0; 6]),
        ("two.weight_scale", "BF16", "[2]", bf(&[1.0, 1.0])),
        u8s("none.weight", [0; 6]),
        ("none.weight_scale", "BF16", "[0]", vec![]),
        u8s("int.weight", [0; 6]),
        ("int.weight_scale", "U8", "[1]", vec![1]),
        u8s("bias.weight", [0; 6]),
        scale("bias.weight_scale", 1.0),
        ("bias.bias", "BF16", "[8]", bf(&[0.0; 8])),
        ("unpacked.weight", "BF16", "[8, 3]", bf(&[1.0, 0.0, -1.0].repeat(8))),
        scale("unpacked.weight_scale", 2.0),
        ("half.weight", "BF16", "[8, 3]", bf(&[[0.0; 23].as_slice(), &[0.5]].concat())),
        scale("half.weight_scale", 2.0),
        ("long.weight", "I64", "[8, 3]", vec![0; 192]),
    ]);
    let linear = |base: &str| c.linear(base, 8, 3, ScaleStyle::Divide);
    let LinearWeight::Ternary(ok) = linear("ok").unwrap() else { panic!() };
    assert_eq!((ok.histogram(), ok.scale()), ([0, 24, 0], Scale::Divide(0.5)));
    let LinearWeight::Ternary(unpacked) = linear("unpacked").unwrap() else { panic!() };
    assert_eq!((unpacked.histogram(), unpacked.scale()), ([8; 3], Scale::Divide(2.0)));
    let cases = [
        ("three", "three.weight", "row 7, column 2"),
        ("unscaled", "unscaled.weight_scale", "missing"),
        ("zero", "zero.weight_scale", "positive"),
        ("negative", "negative.weight_scale", "-1 is no scale"),
        ("nan", "nan.weight_scale", "NaN"),
        ("inf", "inf.weight_scale", "inf"),
        ("tiny", "tiny.weight_scale", "denormal"),
        ("two", "two.weight_scale", "one number"),
        ("none", "none.weight_scale", "one number"),
        ("int", "int.weight_scale", "U8"),
        ("bias", "bias.bias", "bias"),
        ("half", "half.weight", "row 7, column 2 is 0.5"),
        ("long", "long.weight", "I64"),
        ("gone", "gone.weight", "missing"),
    ];
    for (base, name, reason) in cases {
        let (tensor, why) = tensor_error(linear(base).unwrap_err());
        assert!(tensor == name && why.contains(reason), "{tensor}: {why}");
    }
    let (_, why) = tensor_error(c.linear("ok", 12, 3, ScaleStyle::Multiply).unwrap_err());
    assert!(why.contains("[3, 3], the packing of [12, 3]"), "{why}");
    let (_, why) = tensor_error(c.linear("ok", 7, 3, ScaleStyle::Multiply).unwrap_err());
    assert!(why.contains("multiple of 4"), "{why}");
}

mod writing {
    use super::*;
    use candle_bitnet::checkpoint::write::{Entry, write_checkpoint, write_file, write_text};
    use std::io;

    fn entries<'a>() -> Vec<Entry<'a>> {
        vec![
            Entry::from_bytes("codes", StoredType::U8, [2, 3], vec![1; 6]),
            Entry::from_bytes("scale", StoredType::BF16, [1], bf(&[0.5])),
            Entry::new("norm", StoredType::F32, [2], |out| {
                out.write_all(&1f32.to_le_bytes())?;
                out.write_all(&2f32.to_le_bytes())
            }),
            Entry::from_bytes("empty", StoredType::I64, [0, 5], vec![]),
        ]
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_written_reads_back_aligned_whatever_the_shards() {
        for (shard_bytes, files) in [(u64::MAX, 1), (8, 2), (0, 4)] {
            let dir = dir(&[]);
            let mut written = 0;
            let paths = write_checkpoint(dir.path(), entries(), shard_bytes, &mut |n| written += n).unwrap();
            assert_eq!(paths.len(), if files == 1 { 1 } else { files + 1 });
            let c = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(c.files().len(), files);
            assert_eq!(c.names().collect::<Vec<_>>(), ["codes", "empty", "norm", "scale"]);
            assert_eq!((c.vector("norm", 2).unwrap(), c.vector("scale", 1).unwrap()), (vec![1.0, 2.0], vec![0.5]));
            assert_eq!(c.tensor("codes").unwrap().bytes(), [1; 6]);
            let aligned = |t: &candle_bitnet::checkpoint::TensorInfo| t.range.start.is_multiple_of(t.dtype.size());
            assert!(c.tensors().all(aligned));
            assert_eq!(written, c.files().iter().map(|f| f.bytes().len() as u64).sum::<u64>());
        }
    }

    #[test]
    fn an_error_leaves_the_directory_as_it_was() {
        let produce = |bytes: usize| Entry::new("t", StoredType::U8, [4], move |out| out.write_all(&vec![0; bytes]));
        let bytes = |name: &str, shape: &[usize]| Entry::from_bytes(name, StoredType::U8, shape, vec![0; 4]);
        let cases: Vec<(Vec<Entry>, &str)> = vec![
            (vec![], "0 tensors"),
            (vec![produce(3)], "3 bytes were produced where its shape needs 4"),
            (vec![produce(5)], "5 bytes"),
            (vec![Entry::new("t", StoredType::U8, [4], |_| Err(io::Error::other("broke")))], "writing it: broke"),
            (vec![bytes("a", &[4]), bytes("a", &[4])], "tensor a: given twice"),
            (vec![bytes("a b", &[4])], "not printable"),
            (vec![bytes("a\"b", &[4])], "cannot be written"),
            (vec![bytes("__metadata__", &[4])], "cannot be written"),
            (vec![bytes("a", &[1, 1, 1, 1, 4])], "5 dimensions"),
            (vec![bytes("a", &[usize::MAX, 2])], "overflows"),
            (vec![bytes("fine", &[4]), produce(3)], "tensor t"),
        ];
        for (entries, reason) in cases {
            let dir = dir(&[("model.safetensors", b"old")]);
            let err = write_checkpoint(dir.path(), entries, 4, &mut |_| {}).unwrap_err().to_string();
            assert!(err.contains(reason), "{err}");
            assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
            assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap(), b"old");
        }
        // A target that cannot be replaced: the shard before it is taken back.
        let dir = dir(&[]);
        std::fs::create_dir(dir.path().join("model-00002-of-00004.safetensors")).unwrap();
        assert!(write_checkpoint(dir.path(), entries(), 0, &mut |_| {}).is_err());
        assert_eq!(names(dir.path()), ["config.json", "model-00002-of-00004.safetensors"]);
    }

    #[test]
    fn files_are_replaced_whole() {
        let dir = dir(&[]);
        let path = dir.path().join("a.safetensors");
        write_file(&path, entries(), &mut |_| {}).unwrap();
        let before = Checkpoint::open(dir.path()).unwrap();
        let other = vec![Entry::from_bytes("other", StoredType::U8, [1], vec![9])];
        write_file(&path, other, &mut |_| {}).unwrap();
        assert_eq!(before.vector("norm", 2).unwrap(), [1.0, 2.0], "an open checkpoint keeps what it mapped");
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["other"]);
        write_text(&dir.path().join("config.json"), "{\"a\": 1}").unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().config().1, "{\"a\": 1}");
        assert!(write_text(&dir.path().join("no/such.json"), "").is_err());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_ne!(path.metadata().unwrap().permissions().mode() & 0o044, 0, "readable by others, under the umask");
        }
    }
}

#[test]
fn hostile_configs_stay_within_their_allowance() {
    use candle_bitnet::model::config::ModelConfig;
    let size = limits::MAX_CONFIG_SIZE as usize;
    let fill = |start: &str, unit: &str| format!("{start}{}", unit.repeat((size - start.len()) / unit.len()));
    for text in [
        fill(r#"{"eos_token_id": ["#, "1,"),
        fill(r#"{"eos_token_id": "#, "["),
        fill(r#"{"quantization_config": ["#, "{},"),
        fill(r#"{"quantization_config": {"#, r#""a":1,"#),
        fill(r#"{"quantization_config": "#, r#"{"a":"#),
        fill(r#"{"x": "#, r#"{"a":"#),
        fill("{\"architectures\": \"", "a"),
        fill("{", r#""a":1,"#),
    ] {
        let (result, peak) = peak_of(|| ModelConfig::parse(Path::new("config.json"), &text));
        assert!(result.unwrap_err().to_string().len() < 1000);
        assert!(peak <= text.len() + (1 << 20), "{peak} bytes for {}", &text[..40]);
    }
}
