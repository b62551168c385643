//! Which modules a configuration speaks of: lists of names, and regular expressions.

use regex::{Regex, RegexBuilder};

/// Bytes of one pattern.
const MAX_PATTERN: usize = 1024;
/// Bytes of a compiled regular expression.
const MAX_COMPILED: usize = 1 << 18;

/// A regular expression on module names, anchored as PEFT does.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    text: String,
    /// None where the text has no operator but `.`: most patterns are names.
    regex: Option<Regex>,
    whole: bool,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        (&self.text, self.whole) == (&other.text, other.whole)
    }
}

impl Pattern {
    /// One that must match the whole name (`match_target_against_key` in peft's `tuners/tuners_utils.py`).
    pub fn whole(text: &str) -> Result<Self, String> {
        Self::new(text, true)
    }

    /// One that must match the name, or its end after a dot (`get_pattern_key` in peft's `utils/other.py`).
    pub fn ending(text: &str) -> Result<Self, String> {
        Self::new(text, false)
    }

    fn new(text: &str, whole: bool) -> Result<Self, String> {
        if text.is_empty() || text.len() > MAX_PATTERN {
            return Err(format!("a pattern of {} bytes; 1 to {MAX_PATTERN} are accepted", text.len()));
        }
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
        let regex = match plain {
            true => None,
            false => {
                let build = |text: &str| RegexBuilder::new(text).size_limit(MAX_COMPILED).build();
                let anchored = if whole { format!(r"\A(?:{text})\z") } else { format!(r"\A(?:.*\.)?(?:{text})\z") };
                // Alone first: what only balances within the anchors is no regular expression.
                let built = build(text).and_then(|_| build(&anchored));
                Some(built.map_err(|e| {
                    let reason = crate::checkpoint::limits::quoted(&e.to_string()).replace('\n', " ");
                    format!(
                        "{:?} is not supported ({reason}); list the modules instead",
                        crate::checkpoint::limits::quoted(text)
                    )
                })?)
            }
        };
        Ok(Self { text: text.to_owned(), regex, whole })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it takes an engine to match.
    pub fn is_regex(&self) -> bool {
        self.regex.is_some()
    }

    pub fn matches(&self, module: &str) -> bool {
        if let Some(regex) = &self.regex {
            return regex.is_match(module);
        }
        let (name, text) = (module.as_bytes(), self.text.as_bytes());
        let Some(before) = name.len().checked_sub(text.len()) else { return false };
        let (before, end) = name.split_at(before);
        let starts = before.is_empty() || (!self.whole && before.ends_with(b"."));
        starts && end.iter().zip(text).all(|(n, t)| n == t || *t == b'.')
    }
}

/// `target_modules` or `exclude_modules`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Modules {
    /// `all-linear`: every linear layer but the output head.
    AllLinear,
    /// Names, or ends of names after a dot.
    Named(Vec<String>),
    /// A regular expression.
    Matching(Pattern),
}

impl Modules {
    /// As `check_target_module_exists` in peft's `tuners/tuners_utils.py`.
    pub fn contain(&self, module: &str, layers: Option<&[usize]>) -> bool {
        match self {
            Self::AllLinear => module != "lm_head",
            Self::Matching(pattern) => pattern.matches(module),
            Self::Named(names) => {
                names.iter().any(|n| n == module)
                    || names.iter().any(|n| module.strip_suffix(n.as_str()).is_some_and(|rest| rest.ends_with('.')))
                        && layers.is_none_or(|layers| layer_of(module).is_some_and(|l| layers.contains(&l)))
            }
        }
    }
}

/// The first part of a module's name that is a number between two others.
fn layer_of(module: &str) -> Option<usize> {
    let mut parts = module.split('.').skip(2).peekable();
    while let Some(part) = parts.next() {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) && parts.peek().is_some() {
            return part.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: &str = "model.layers.1.self_attn.q_proj";

    #[test]
    fn patterns_match_as_python_answers() {
        // (pattern, module, re.fullmatch(pattern, module), re.match(rf"(.*\.)?({pattern})$", module))
        let cases = [
            ("q_proj", Q, false, true),
            ("proj", Q, false, false),
            ("self_attn.q_proj", Q, false, true),
            ("self_attn.q.proj", Q, false, true),
            (Q, Q, true, true),
            (r".*\.(q|v)_proj", Q, true, true),
            (r".*\.(k|v)_proj", Q, false, false),
            (r"model\.layers\.\d+\..*", "model.layers.12.mlp.up_proj", true, true),
            (r"layers\.1\..*", "model.layers.12.mlp.up_proj", false, false),
            ("a|model.*", Q, true, true),
            ("^q_proj", Q, false, false),
            ("q_proj$", Q, false, true),
        ];
        for (pattern, module, whole, ending) in cases {
            assert_eq!(Pattern::whole(pattern).unwrap().matches(module), whole, "{pattern} on {module}");
            assert_eq!(Pattern::ending(pattern).unwrap().matches(module), ending, "ending {pattern} on {module}");
        }
    }

    #[test]
    fn what_cannot_be_matched_is_refused_by_name() {
        for bad in ["(?=x)q", "(", "a)(b", r"(a)\1", "[", "(((a{99}){99}){99}){99}"] {
            let e = Pattern::whole(bad).unwrap_err();
            assert!(e.contains(bad) && e.contains("list the modules") && !e.contains('\n'), "{e}");
        }
        assert!(Pattern::whole("").is_err() && Pattern::ending(&"a".repeat(MAX_PATTERN + 1)).is_err());
    }

    #[test]
    fn lists_match_ends_after_a_dot_and_may_be_limited_to_layers() {
        let named = |names: &[&str]| Modules::Named(names.iter().map(|n| (*n).to_owned()).collect());
        assert!(named(&["v_proj", "q_proj"]).contain(Q, None));
        assert!(!named(&["proj", "k_proj"]).contain(Q, None));
        assert!(named(&["q_proj"]).contain(Q, Some(&[0, 1])) && !named(&["q_proj"]).contain(Q, Some(&[0, 2])));
        // A whole name is meant, whatever the layers.
        assert!(named(&[Q]).contain(Q, Some(&[0])));
        assert!(Modules::AllLinear.contain(Q, None) && !Modules::AllLinear.contain("lm_head", None));
        for (module, layer) in [(Q, Some(1)), ("lm_head", None), ("a.b.3", None), ("layers.4.x", None)] {
            assert_eq!(layer_of(module), layer, "{module}");
        }
    }
}
