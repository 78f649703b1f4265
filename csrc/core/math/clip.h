// The clip coefficient: what the finalize step of reduce makes of a gradient norm.
#pragma once

#include "core/config.h"

namespace pysmooth {

enum class ClipMode : int {
  none = 0,        // 1
  hard = 1,        // min(1, max_norm / (norm + eps))
  smooth = 2,      // 1 / (1 + norm / max_norm)
  normalize = 3,   // max_norm / (norm + eps), and 0 for norm = 0
  smoothness = 4,  // 1 / (L0 + L1 * norm), and 0 where that has no value: the (L0,L1)-GD step
  agc = 5,         // a coefficient per row, as agc_coefficient() says
};

struct Clip {
  ClipMode mode = ClipMode::none;
  double max_norm = 0.0;  // agc: in units of the parameter's norm
  double eps = 0.0;
  double l0 = 0.0;
  double l1 = 0.0;

  PYSMOOTH_HD bool needs_norm() const { return mode != ClipMode::none; }
};

// Comparisons are written so that a NaN norm gives a NaN coefficient: whether a non-finite gradient
// may reach the parameters is the policy's business, not the formula's.
PYSMOOTH_HD double clip_coefficient(const Clip& clip, double norm) {
  switch (clip.mode) {
    case ClipMode::none:
    case ClipMode::agc:
      return 1.0;
    case ClipMode::hard: {
      const double coef = clip.max_norm / (norm + clip.eps);
      return coef > 1.0 ? 1.0 : coef;
    }
    case ClipMode::smooth:
      return 1.0 / (1.0 + norm / clip.max_norm);
    case ClipMode::normalize:
      return norm == 0.0 ? 0.0 : clip.max_norm / (norm + clip.eps);
    case ClipMode::smoothness: {
      const double curvature = clip.l0 + clip.l1 * norm;
      return curvature == 0.0 ? 0.0 : 1.0 / curvature;
    }
  }
  return 1.0;
}

// Adaptive gradient clipping: what a row of a gradient is multiplied by, given the norms of that
// row and of the parameter's.
PYSMOOTH_HD double agc_coefficient(const Clip& clip, double param_norm, double grad_norm) {
  if (grad_norm == 0.0) return 1.0;
  const double norm = param_norm < clip.eps ? clip.eps : param_norm;
  const double coef = clip.max_norm * norm / grad_norm;
  return coef > 1.0 ? 1.0 : coef;
}

}  // namespace pysmooth
