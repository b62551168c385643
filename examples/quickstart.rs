//! Load a model and stream an answer.
//!
//!     cargo run --release --example quickstart -- microsoft/bitnet-b1.58-2B-4T
//!
//! Without an argument it runs a tiny checkpoint with random weights from the test fixtures, whose answer is
//! noise: it shows that everything works, nothing more.

use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::text::Message;
use candle_bitnet::{BitNet, DeviceChoice, LoadOptions, select_device};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/a1_packed");
    let name = std::env::args().nth(1).unwrap_or_else(|| fixture.into());
    let device = select_device(DeviceChoice::Auto)?;
    let mut model = BitNet::load(&name, LoadOptions::new(&device))?;
    eprintln!("{}", model.report());

    let prompt = model.chat_prompt(&[Message::user("Why is the sky blue?")])?;
    let options = GenerateOptions::default().temperature(0.7).top_p(0.9).seed(42).max_tokens(64);
    for piece in model.generate(&prompt, &options)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
