// Arguments and results of the policy loss, shared by every operation that computes it or its
// advantages.
#pragma once
#include "binding/op.h"
#include "ops/policy_loss.h"

namespace p2r::binding {

// Reads advantagesPer, null where their size decides: whether `advantages` holds a value a token.
bool read_advantages_per(Call& call, const In& advantages, int64_t tokens, int64_t sequences);
// Reads what lossArguments in lib/ops/policy_loss.ts passes, for `tokens` tokens.
void read_policy_loss(Call& call, PolicyLossArgs& a, int64_t tokens);
// The loss and its metrics.
void policy_loss_results(Call& call, PolicyLossArgs& a);

}  // namespace p2r::binding
