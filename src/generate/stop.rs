//! Stop strings in a stream of text.

/// Lets text through until a stop string is complete. Text that may be the beginning of one is held back. What comes
/// out does not depend on how the text was cut into pieces: of several stop strings the one that is complete first
/// counts, and of several complete at once the longest.
#[derive(Debug, Clone)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Appends `text`; returns what is certain now, and whether a stop string ended it.
    pub(super) fn push(&mut self, text: String) -> (String, bool) {
        if self.stops.is_empty() {
            return (text, false);
        }
        self.held.push_str(&text);
        // The first end counts; among equal ends the first beginning.
        let found = self.stops.iter().filter_map(|s| self.held.find(s).map(|at| (at + s.len(), at))).min();
        if let Some((_, start)) = found {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let open = |at: usize| self.held.get(at..).is_some_and(|tail| self.stops.iter().any(|s| s.starts_with(tail)));
        let keep = (from..self.held.len()).find(|&at| open(at)).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What is held back, when no more text follows.
    pub(super) fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = vec![];
        for piece in pieces {
            let (text, stopped) = matcher.push((*piece).to_owned());
            out.push(text);
            if stopped {
                return (out, true);
            }
        }
        out.push(matcher.flush());
        (out, false)
    }

    #[test]
    fn holds_only_what_may_stop() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
        assert_eq!(run(&["END"], &["xE", "N", "D y"]), (vec!["x".into(), "".into(), "".into()], true));
        assert_eq!(run(&["END"], &["xE", "Nd"]), (vec!["x".into(), "ENd".into(), "".into()], false));
        assert_eq!(run(&["END"], &["E", "EN"]), (vec!["".into(), "E".into(), "EN".into()], false));
        assert_eq!(run(&["é!"], &["aé", "b"]), (vec!["a".into(), "éb".into(), "".into()], false));
        assert_eq!(run(&["abc", "b"], &["abc"]), (vec!["a".into()], true));
        assert_eq!(run(&["bc", "abc"], &["xa", "bc"]), (vec!["x".into(), "".into()], true));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "[abé]{0,30}", stops in prop::collection::vec("[abé]{1,4}", 0..4), cuts in prop::collection::vec(0usize..40, 0..6)) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let one_by_one: Vec<&str> = chars.iter().map(String::as_str).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let (a, a_stopped) = run(&stops, &one_by_one);
            let (b, b_stopped) = run(&stops, &pieces);
            prop_assert_eq!(a.concat(), b.concat());
            prop_assert_eq!(a_stopped, b_stopped);
            prop_assert_eq!(a_stopped, stops.iter().any(|s| text.contains(s)));
        }
    }
}
