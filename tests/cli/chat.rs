//! `bitnet chat`, its messages on standard input.

use crate::{model, run, run_with};

/// Positions of the prompts of a conversation, and of its answers, from the lines of `--stats`.
fn prompts(err: &str) -> Vec<usize> {
    let lines = err.lines().filter_map(|l| l.strip_prefix("prompt: "));
    lines.map(|l| l.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn a_conversation_has_commands_and_a_memory() {
    let a1 = model("a1_packed");
    let args = ["chat", "-m", &a1, "--greedy", "-n", "4", "--stats"];
    let ran = run_with(&args, "one\ntwo\n/reset\none\n/help\n/nonsense\n//slash\n/exit\nnever\n");
    let turns = prompts(&ran.err);
    assert_eq!(turns.len(), 4, "{ran:?}");
    // The second prompt holds the first turn; a new conversation is as long as the first was.
    assert!(turns[1] > turns[0] + 4 && turns[2] == turns[0], "{turns:?}");
    for part in ["new conversation", "/system TEXT", "no command /nonsense", "--max-tokens"] {
        assert!(ran.err.contains(part), "no {part:?} in {}", ran.err);
    }
    let said = ran.ok();
    let alone = run_with(&args, "one\n").ok();
    assert!(said.starts_with(&alone) && said.matches(&alone).count() >= 2, "{said:?} {alone:?}");

    let ran = run_with(&args, "/system Be brief.\none\n/system\n/reset\none\n");
    assert!(ran.err.contains("system message set") && ran.err.contains("system message removed"), "{ran:?}");
    let with_system = prompts(&ran.err);
    assert!(with_system[0] > turns[0] && with_system[1] == turns[0], "{with_system:?}");
    let flag = run_with(&[&args[..], &["--system", "Be brief."]].concat(), "one\n");
    assert_eq!(prompts(&flag.err), with_system[..1]);
}

#[test]
fn a_message_that_does_not_fit_is_left_out() {
    let a1 = model("a1_packed");
    let long = "b ".repeat(600);
    let ran = run_with(&["chat", "-m", &a1, "--greedy", "-n", "4"], &format!("hi\n{long}\nhi\n"));
    assert!(ran.err.contains("holds 512") && ran.err.contains("/reset"), "{ran:?}");
    ran.ok();
}

#[test]
fn what_cannot_chat_is_refused_before_the_first_message() {
    run(&["chat", "-m", "./gone"]).fails(1, &["./gone", "no such directory"]);
    run(&["chat", "-m", "x", "--temperature", "-1"]).fails(2, &["temperature"]);
    let dir = crate::hostile::copy("a1_packed");
    std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    run(&["chat", "-m", dir.path().to_str().unwrap()]).fails(1, &["template"]);
    run(&["generate", "--chat", "-p", "x", "-m", dir.path().to_str().unwrap()]).fails(1, &["template"]);
}
