//! Rotary embeddings as config.json describes them -> inverse frequencies.

use baton_kernels::RopeParams;

use super::architecture::Architecture;
use super::error::ModelError;
use super::fields::{Fields, brief};

/// A rotary embedding over the first `rotary_dim` elements of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of frequencies.
    pub theta: f64,
    /// Elements that turn, even.
    pub rotary_dim: usize,
    /// How frequencies are changed for contexts longer than the pre-training's.
    pub scaling: RopeScaling,
}

/// Variants of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor` (Chen et al., arXiv:2306.15595).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al., arXiv:2309.00071): a ramp from kept to divided frequencies, and a factor on attention.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Turns within the original context from which on a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole frequencies.
        truncate: bool,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Context length of the pre-training.
        original_max_position_embeddings: f64,
    },
    /// LongRoPE (Ding et al., arXiv:2402.13753): each frequency has divisors of its own, one for sequences up to the original
    /// length and one for longer ones.
    LongRope {
        /// Divisors up to the original length, one for each frequency.
        short_factor: Vec<f64>,
        /// Divisors beyond it.
        long_factor: Vec<f64>,
        /// Factor on cos and sin, in both.
        attention_factor: f64,
        /// Context length of the pre-training, tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// The tables: one, or for LongRoPE that of short sequences and that of long ones.
    pub fn variants(&self) -> Vec<RopeParams> {
        let RopeConfig {
            theta,
            rotary_dim,
            ref scaling,
        } = *self;
        let n = rotary_dim / 2;
        let plain = |pair: usize| theta.powf(-((2 * pair) as f64) / rotary_dim as f64);
        let table = |inv_freq: &dyn Fn(usize) -> f64, attention_factor: f64| RopeParams {
            inv_freq: (0..n).map(|pair| inv_freq(pair) as f32).collect(),
            attention_factor: attention_factor as f32,
        };
        match scaling {
            RopeScaling::Default => vec![table(&plain, 1.0)],
            RopeScaling::Linear { factor } => vec![table(&|pair| plain(pair) / factor, 1.0)],
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let scaled = |pair: usize| {
                    let inv_freq = plain(pair);
                    let wavelength = 2.0 * std::f64::consts::PI / inv_freq;
                    if wavelength > original / low_freq_factor {
                        inv_freq / factor
                    } else if wavelength < original / high_freq_factor {
                        inv_freq
                    } else {
                        let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - kept) * inv_freq / factor + kept * inv_freq
                    }
                };
                vec![table(&scaled, 1.0)]
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
                original_max_position_embeddings: original,
            } => {
                // The frequency, by number and fractional, that turns so often within the original context.
                let number_of = |turns: f64| {
                    rotary_dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (number_of(*beta_fast), number_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min((rotary_dim - 1) as f64));
                let width = if low == high { 0.001 } else { high - low };
                let scaled = |pair: usize| {
                    let divided = ((pair as f64 - low) / width).clamp(0.0, 1.0);
                    plain(pair) * (divided / factor + 1.0 - divided)
                };
                vec![table(&scaled, *attention_factor)]
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                attention_factor,
                ..
            } => [short_factor, long_factor]
                .into_iter()
                .map(|divisors| table(&|pair| plain(pair) / divisors[pair], *attention_factor))
                .collect(),
        }
    }

    /// Tokens of the longest sequence that takes the first of two variants.
    pub fn short_context(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope {
                original_max_position_embeddings,
                ..
            } => Some(original_max_position_embeddings),
            _ => None,
        }
    }
}

/// The rotary embedding of full layers, and that of windowed layers where it differs.
pub(crate) fn ropes_of(
    fields: &Fields<'_>,
    architecture: &Architecture,
    head_dim: usize,
    has_windows: bool,
) -> Result<Vec<RopeConfig>, ModelError> {
    let theta = architecture.defaults.rope_theta;
    // The newer spelling, `rope_parameters`, holds everything, perhaps once for each kind of layer.
    let parameters = fields.object("rope_parameters")?;
    if let Some(parameters) = parameters
        && let Some(full) = parameters.object("full_attention")?
    {
        let mut ropes = vec![rope_of(fields, Some(full), Some(full), theta, head_dim)?];
        if has_windows && let Some(windowed) = parameters.object("sliding_attention")? {
            let theta = architecture.window_rope_theta.map_or(theta, |(_, theta)| theta);
            ropes.push(rope_of(fields, Some(windowed), Some(windowed), theta, head_dim)?);
        }
        return Ok(ropes);
    }
    let scaling = match parameters {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let mut ropes = vec![rope_of(fields, parameters, scaling, theta, head_dim)?];
    if has_windows && let Some((field, default)) = architecture.window_rope_theta {
        ropes.push(RopeConfig {
            theta: fields.positive_float(field)?.unwrap_or(default),
            rotary_dim: ropes[0].rotary_dim,
            scaling: RopeScaling::Default,
        });
    }
    Ok(ropes)
}

/// `theta_of` holds `rope_theta` in the newer spelling.
fn rope_of(
    fields: &Fields<'_>,
    theta_of: Option<Fields<'_>>,
    scaling: Option<Fields<'_>>,
    default_theta: f64,
    head_dim: usize,
) -> Result<RopeConfig, ModelError> {
    let theta = match theta_of {
        Some(parameters) => parameters.positive_float("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.positive_float("rope_theta")?.unwrap_or(default_theta),
    };
    let partial = match scaling {
        Some(scaling) => scaling.positive_float("partial_rotary_factor")?,
        None => None,
    };
    let partial = match partial {
        Some(partial) => partial,
        None => fields.positive_float("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let rotary_dim = (head_dim as f64 * partial) as usize;
    if partial > 1.0 || rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
        let expected = format!("a share of head_dim ({head_dim}) that is an even number of elements");
        return Err(fields.wrong("partial_rotary_factor", expected, partial));
    }
    Ok(RopeConfig {
        theta,
        rotary_dim,
        scaling: match scaling {
            Some(scaling) => scaling_of(fields, &scaling, rotary_dim)?,
            None => RopeScaling::Default,
        },
    })
}

fn scaling_of(fields: &Fields<'_>, scaling: &Fields<'_>, rotary_dim: usize) -> Result<RopeScaling, ModelError> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let spelling = scaling.spelling(&["rope_type", "type"]).unwrap_or("rope_type");
    let max_positions = fields.positive_float("max_position_embeddings")?.unwrap_or(2048.0);
    // Beside the factors, or at the top, or the maximum itself.
    let original = match scaling.positive_float(ORIGINAL)? {
        Some(original) => original,
        None => fields.positive_float(ORIGINAL)?.unwrap_or(max_positions),
    };
    Ok(match scaling.string(spelling)? {
        None | Some("default") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear {
            factor: scaling.required_positive_float("factor")?,
        },
        Some("llama3") => {
            let low_freq_factor = scaling.required_positive_float("low_freq_factor")?;
            let high_freq_factor = scaling.required_positive_float("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("a number above low_freq_factor ({low_freq_factor})");
                return Err(scaling.wrong("high_freq_factor", expected, high_freq_factor));
            }
            RopeScaling::Llama3 {
                factor: scaling.required_positive_float("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: scaling.required_positive_float(ORIGINAL)?,
            }
        }
        Some("yarn") => {
            let factor = scaling.required_positive_float("factor")?;
            let magnitude = |scale: f64| {
                if factor <= 1.0 {
                    1.0
                } else {
                    0.1 * scale * factor.ln() + 1.0
                }
            };
            let scales = (
                scaling.positive_float("mscale")?,
                scaling.positive_float("mscale_all_dim")?,
            );
            let attention_factor = match (scaling.positive_float("attention_factor")?, scales) {
                (Some(factor), _) => factor,
                (None, (Some(scale), Some(all))) => magnitude(scale) / magnitude(all),
                (None, _) => magnitude(1.0),
            };
            RopeScaling::Yarn {
                factor,
                beta_fast: scaling.positive_float("beta_fast")?.unwrap_or(32.0),
                beta_slow: scaling.positive_float("beta_slow")?.unwrap_or(1.0),
                truncate: scaling.boolean("truncate")?.unwrap_or(true),
                attention_factor,
                original_max_position_embeddings: original,
            }
        }
        // "su" is what Phi-3's first files call it.
        Some("longrope" | "su") => {
            let factors = |field: &'static str| {
                let factors = scaling.positive_floats(field)?;
                if factors.len() != rotary_dim / 2 {
                    let expected = format!("{} numbers, one for each frequency", rotary_dim / 2);
                    return Err(scaling.wrong(field, expected, format_args!("{}", factors.len())));
                }
                Ok(factors)
            };
            let ratio = match scaling.positive_float("factor")? {
                Some(factor) => factor,
                None => max_positions / original,
            };
            let attention_factor = match scaling.positive_float("attention_factor")? {
                Some(factor) => factor,
                None if ratio <= 1.0 => 1.0,
                None => (1.0 + ratio.ln() / original.ln()).sqrt(),
            };
            RopeScaling::LongRope {
                short_factor: factors("short_factor")?,
                long_factor: factors("long_factor")?,
                attention_factor,
                original_max_position_embeddings: original as usize,
            }
        }
        Some(other) => {
            let expected = "default, linear, llama3, yarn or longrope";
            return Err(scaling.wrong(spelling, expected, brief(&other.into())));
        }
    })
}
