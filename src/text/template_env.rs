//! The Jinja environment in which chat templates are rendered: what transformers offers, within limits.

use super::clock;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use std::fmt::Write as _;

/// Instructions that a template may execute for one prompt. A message takes under a hundred in known templates.
pub const TEMPLATE_FUEL: u64 = 1_000_000;

/// Largest prompt text that a template may render, in bytes.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;

/// Nesting of values that `tojson` follows.
const MAX_JSON_DEPTH: usize = 64;

/// An environment as transformers' `apply_chat_template` sets it up, for so many instructions.
pub(super) fn environment(fuel: u64) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(fuel));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| {
        clock::strftime(clock::now(), &format).map_err(|e| Error::new(ErrorKind::InvalidOperation, e))
    });
    env.add_filter("tojson", to_json);
    Ok(env)
}

/// `{% generation %}` blocks only mark the assistant's text for training; minijinja does not know them.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some((tag, after)) = rest[start + 2..].split_once("%}") else { break };
        let name = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start]);
        match name {
            "generation" => out.push_str(&format!("{{%{}%}}", tag.replace(name, "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", tag.replace(name, "endif"))),
            _ => out.extend(["{%", tag, "%}"]),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps`, as transformers uses it: no HTML escapes, `", "` and `": "` between items, optional `indent`.
fn to_json(value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut writer = JsonWriter { out: String::new(), indent: indent.map(|i| i.min(16)), ascii, sort };
    writer.value(&value, 0)?;
    Ok(writer.out)
}

struct JsonWriter {
    out: String,
    indent: Option<usize>,
    ascii: bool,
    sort: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH || self.out.len() > MAX_RENDERED_BYTES {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is too large"));
        }
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((key.to_string(), value.get_item(&key)?));
                }
                if self.sort {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.items('{', '}', depth, entries.iter(), |w, (key, item)| {
                    w.string(key);
                    w.out.push_str(": ");
                    w.value(item, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', ']', depth, items.iter(), |w, item| w.value(item, depth + 1))?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: cannot write a {kind}"))),
        }
        Ok(())
    }

    fn items<T>(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: impl ExactSizeIterator<Item = T>,
        mut write: impl FnMut(&mut Self, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let empty = items.len() == 0;
        self.out.push(open);
        for (i, item) in items.enumerate() {
            if i > 0 {
                self.out.push_str(if self.indent.is_some() { "," } else { ", " });
            }
            self.newline(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.newline(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn newline(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn render(source: &str, ctx: Value) -> Result<String, Error> {
        environment(TEMPLATE_FUEL)?.render_str(source, ctx)
    }

    #[test]
    fn tojson_is_pythons() {
        let ctx =
            context! { v => context! { b => vec![1, 2], a => "<é\n\"", n => (), t => true, e => Vec::<i32>::new() } };
        assert_eq!(
            render("{{ v | tojson }}", ctx.clone()).unwrap(),
            r#"{"b": [1, 2], "a": "<é\n\"", "n": null, "t": true, "e": []}"#
        );
        assert_eq!(render("{{ v.a | tojson(ensure_ascii=true) }}", ctx.clone()).unwrap(), r#""<\u00e9\n\"""#);
        assert_eq!(
            render("{{ [1, {'a': 2}] | tojson(indent=2) }}", ctx).unwrap(),
            "[\n  1,\n  {\n    \"a\": 2\n  }\n]"
        );
    }

    #[test]
    fn python_methods_and_whitespace_rules() {
        assert_eq!(render("{{ ' a '.strip() + 'x y'.split(' ')[1] }}", context! {}).unwrap(), "ay");
        assert_eq!(render("  {% if true %}\nx\n  {% endif %}\n", context! {}).unwrap(), "x\n");
        assert!(
            render("{{ raise_exception('no system role') }}", context! {})
                .unwrap_err()
                .to_string()
                .contains("no system role")
        );
        assert_eq!(render("{{ strftime_now('%Y') | length }}", context! {}).unwrap(), "4");
    }

    #[test]
    fn fuel_ends_long_loops() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert_eq!(render(source, context! {}).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }

    #[test]
    fn generation_tags_are_transparent() {
        let source = without_generation_tags("a{%- generation -%} b {% endgeneration %}{% if true %}c{% endif %}{%");
        assert_eq!(source, "a{%- if true -%} b {% endif %}{% if true %}c{% endif %}{%");
        for untouched in ["{%}", "a{%}%}", "{%%}", "{%", "{{%}", "%}{%é"] {
            assert_eq!(without_generation_tags(untouched), untouched);
        }
    }
}
