//! The tensors that a forward pass writes into, made before it: a decode step allocates nothing, and finds them in the same
//! place every time.

use super::config::ModelConfig;
use super::decoder::{Logits, Sequence};
use crate::Result;
use crate::backend::attention::{AttentionShape, RowPosition};
use crate::backend::{Backend, Batch, Steps};
use candle_core::{DType, Device, Tensor};

/// Rows of a decode step, one for each sequence, whose tensors are always there.
const STEP_ROWS: usize = 8;
/// Most rows whose tensors are kept for the next pass.
const KEPT_ROWS: usize = 512;

/// Columns of the tensors of one model.
#[derive(Debug, Clone, Copy)]
struct Widths {
    hidden: usize,
    qkv: usize,
    context: usize,
    intermediate: usize,
    vocab: usize,
}

/// Activations of a pass, f32, one row a token.
#[derive(Debug)]
pub(super) struct Activations {
    /// The residual stream.
    pub x: Tensor,
    /// Query, key and value.
    pub qkv: Tensor,
    /// What attention gives.
    pub context: Tensor,
    /// The gated product of the MLP.
    pub hidden: Tensor,
}

impl Activations {
    fn new(widths: Widths, rows: usize, device: &Device) -> Result<Self> {
        let zeros = |cols: usize| Tensor::zeros((rows, cols), DType::F32, device);
        let (x, qkv) = (zeros(widths.hidden)?, zeros(widths.qkv)?);
        Ok(Self { x, qkv, context: zeros(widths.context)?, hidden: zeros(widths.intermediate)? })
    }

    fn first(&self, rows: usize) -> Result<Self> {
        let first = |t: &Tensor| t.narrow(0, 0, rows);
        let (x, qkv) = (first(&self.x)?, first(&self.qkv)?);
        Ok(Self { x, qkv, context: first(&self.context)?, hidden: first(&self.hidden)? })
    }
}

/// Rows whose logits are wanted, f32.
#[derive(Debug)]
pub(super) struct Outputs {
    /// The residual stream, where not every row of it is wanted.
    pub picked: Tensor,
    /// The same, normalised.
    pub last: Tensor,
    /// Their logits.
    pub logits: Tensor,
    /// Whether the next pass writes into the same tensors.
    pub kept: bool,
}

impl Outputs {
    fn new(widths: Widths, rows: usize, device: &Device, kept: bool) -> Result<Self> {
        let zeros = |cols: usize| Tensor::zeros((rows, cols), DType::F32, device);
        Ok(Self { picked: zeros(widths.hidden)?, last: zeros(widths.hidden)?, logits: zeros(widths.vocab)?, kept })
    }

    fn first(&self, rows: usize) -> Result<Self> {
        let first = |t: &Tensor| t.narrow(0, 0, rows);
        let (picked, last) = (first(&self.picked)?, first(&self.last)?);
        Ok(Self { picked, last, logits: first(&self.logits)?, kept: self.kept })
    }
}

/// What one pass reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    /// Its tokens.
    pub batch: &'a Batch,
    /// Rows as there are tokens.
    pub activations: &'a Activations,
    /// Which rows' logits are wanted; none stands for all.
    pub picks: &'a [u32],
    /// Rows as are wanted.
    pub outputs: &'a Outputs,
}

/// Tensors for passes of more rows than a decode step.
#[derive(Debug)]
struct Large {
    batch: Batch,
    activations: Activations,
}

/// The tensors of one decoder.
#[derive(Debug)]
pub(super) struct Workspace {
    backend: Backend,
    widths: Widths,
    step: Batch,
    /// Passes of one token of each sequence, which differ in what the batch holds alone.
    steps: Steps,
    /// Views of the first 1, 2, … rows.
    step_activations: Vec<Activations>,
    step_outputs: Vec<Outputs>,
    large: Option<Large>,
    /// The pass's tokens, their positions, and the rows whose logits are wanted, before they go where they are read.
    ids: Vec<u32>,
    rows: Vec<RowPosition>,
    picks: Vec<u32>,
}

impl Workspace {
    /// Makes the tensors of a decode step.
    ///
    /// # Errors
    /// Of the device, if it refuses the memory.
    pub fn new(backend: &Backend, config: &ModelConfig, shape: AttentionShape) -> Result<Self> {
        let widths = Widths {
            hidden: config.hidden_size,
            qkv: shape.qkv_dim(),
            context: shape.heads * shape.head_dim,
            intermediate: config.intermediate_size,
            vocab: config.vocab_size,
        };
        let activations = Activations::new(widths, STEP_ROWS, backend.device())?;
        let outputs = Outputs::new(widths, STEP_ROWS, backend.device(), true)?;
        Ok(Self {
            widths,
            step: backend.batch(STEP_ROWS)?,
            steps: backend.steps(),
            step_activations: (1..=STEP_ROWS).map(|n| activations.first(n)).collect::<Result<_>>()?,
            step_outputs: (1..=STEP_ROWS).map(|n| outputs.first(n)).collect::<Result<_>>()?,
            large: None,
            ids: Vec::with_capacity(STEP_ROWS),
            rows: Vec::with_capacity(STEP_ROWS),
            picks: Vec::with_capacity(STEP_ROWS),
            backend: backend.clone(),
        })
    }

    /// Prepares a pass over `sequences`, none of which is empty, lets `run` compute it or replays what it computed before,
    /// and calls `read` with what came out. `cache` identifies the KV cache.
    ///
    /// # Errors
    /// As [`Batch::set`]; of the device, if it refuses memory for more rows; those of `run` and `read`.
    pub fn with<R>(
        &mut self,
        sequences: &[Sequence<'_>],
        logits: Logits,
        cache: u64,
        run: impl Fn(Pass<'_>) -> Result<()>,
        read: impl FnOnce(&Outputs) -> Result<R>,
    ) -> Result<R> {
        self.ids.clear();
        self.rows.clear();
        self.picks.clear();
        for s in sequences {
            self.ids.extend_from_slice(s.tokens);
            self.rows.extend((0..s.tokens.len()).map(|i| RowPosition { slot: s.slot, position: s.position + i }));
            self.picks.push((self.ids.len() - 1) as u32);
        }
        let rows = self.ids.len();
        if logits == Logits::All || rows == sequences.len() {
            self.picks.clear();
        }
        let wanted = if self.picks.is_empty() { rows } else { self.picks.len() };
        let own;
        let outputs = match self.step_outputs.get(wanted - 1) {
            Some(outputs) => outputs,
            None => {
                own = Outputs::new(self.widths, wanted, self.backend.device(), false)?;
                &own
            }
        };
        let (backend, widths, ids, positions, picks) =
            (&self.backend, self.widths, &self.ids, &self.rows, &self.picks[..]);
        if let Some(activations) = self.step_activations.get(rows - 1) {
            self.step.set(ids, positions)?;
            let pass = Pass { batch: &self.step, activations, picks, outputs };
            match rows == sequences.len() {
                true => self.steps.run(&self.step, cache, || run(pass))?,
                false => run(pass)?,
            }
            return read(outputs);
        }
        let new = |rows: usize| -> Result<Large> {
            let activations = Activations::new(widths, rows, backend.device())?;
            Ok(Large { batch: backend.batch(rows)?, activations })
        };
        let mut call;
        let large = match &mut self.large {
            _ if rows > KEPT_ROWS => {
                call = new(rows)?;
                &mut call
            }
            Some(large) if large.batch.capacity() >= rows => large,
            large => {
                // The smaller one goes before the larger one comes.
                *large = None;
                large.insert(new(rows.next_power_of_two().min(KEPT_ROWS))?)
            }
        };
        large.batch.set(ids, positions)?;
        let activations = large.activations.first(rows)?;
        run(Pass { batch: &large.batch, activations: &activations, picks, outputs })?;
        read(outputs)
    }

    /// Why steps are not replayed any more, once.
    pub fn take_replay_failure(&mut self) -> Option<String> {
        self.steps.take_failure()
    }
}
