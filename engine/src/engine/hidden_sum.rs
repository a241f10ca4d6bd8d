//! The sum of a sequence's hidden states while its chunks are computed, row after row, so that neither the chunks nor the
//! rest of a batch change a bit of the mean. Scales nothing: what an embedding looks like to a client is the front door's business.

/// Of the rows so far, in f64: over 100,000 rows, f32 would lose more than the model's own arithmetic does.
#[derive(Clone, Debug)]
pub(super) struct HiddenSum {
    /// `[hidden_size]`
    sum: Vec<f64>,
    n_rows: usize,
}

/// A hidden state that is not a number, or not a finite one.
#[derive(Debug, thiserror::Error)]
#[error("the hidden state of token {row} is not finite")]
pub(super) struct NotFinite {
    row: usize,
}

impl HiddenSum {
    pub(super) fn new(hidden_size: usize) -> HiddenSum {
        HiddenSum {
            sum: vec![0.0; hidden_size],
            n_rows: 0,
        }
    }

    /// Rows so far.
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Takes the next rows, `[n_rows, hidden_size]`.
    ///
    /// # Errors
    /// A row that is not finite.
    pub(super) fn add(&mut self, rows: &[f32]) -> Result<(), NotFinite> {
        for row in rows.chunks_exact(self.sum.len()) {
            if !row.iter().all(|value| value.is_finite()) {
                return Err(NotFinite { row: self.n_rows });
            }
            for (sum, &value) in self.sum.iter_mut().zip(row) {
                *sum += f64::from(value);
            }
            self.n_rows += 1;
        }
        Ok(())
    }

    /// All rows will come again.
    pub(super) fn restart(&mut self) {
        self.sum.fill(0.0);
        self.n_rows = 0;
    }

    /// `[hidden_size]`
    pub(super) fn mean(&self) -> Vec<f32> {
        let n_rows = self.n_rows as f64;
        self.sum.iter().map(|sum| (sum / n_rows) as f32).collect()
    }
}
