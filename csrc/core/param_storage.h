// How a 16-bit parameter keeps what its 16 bits cannot hold. x is the value that rules compute
// with, in float; round() rounds to nearest.
//
//   plain        x = p                      p = round(x)
//   master       x = companion, in float32  companion = x ; p = round(x)
//   kahan        x = p + companion          q = round(x) ; y = q + round(x - q) ; p = round(y) ;
//                                           companion = y - p
//   stochastic   x = p                      p = x, rounded at random; bfloat16 only
//
// Kahan's y is what is kept of x, and p what y rounds to, whichever way a tie went: so storing what
// was loaded changes no bit. Where p is not finite the companion is 0. Values as in
// pysmooth/engine/recipe.py.
#pragma once

namespace pysmooth {

enum class ParamStorage : int { plain = 0, master = 1, kahan = 2, stochastic = 3 };

constexpr bool has_companion(ParamStorage s) {
  return s == ParamStorage::master || s == ParamStorage::kahan;
}

}  // namespace pysmooth
