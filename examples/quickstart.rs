//! Load a model and stream an answer.
//!
//!     cargo run --release --example quickstart -- microsoft/bitnet-b1.58-2B-4T
//!
//! Without an argument it runs the built-in model, which needs no download and continues a play.

use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::text::Message;
use candle_bitnet::{BitNet, DeviceChoice, LoadOptions, select_device};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "builtin".into());
    let device = select_device(DeviceChoice::Auto)?;
    let mut model = BitNet::load(&name, LoadOptions::new(&device))?;
    eprintln!("{}", model.report());

    let prompt = match model.chat_template() {
        Ok(_) => model.chat_prompt(&[Message::user("Why is the sky blue?")])?,
        Err(_) => model.encode("ROMEO:")?,
    };
    let options = GenerateOptions::default().temperature(0.7).top_p(0.9).seed(42).max_tokens(64);
    for piece in model.generate(&prompt, &options)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
