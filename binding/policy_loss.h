// Arguments and results of the policy loss, shared by every operation that computes it.
#pragma once
#include "binding/op.h"
#include "ops/policy_loss.h"

namespace p2r::binding {

// Reads what lossArguments in lib/ops/policy_loss.ts passes, for `tokens` tokens.
void read_policy_loss(Call& call, PolicyLossArgs& a, int64_t tokens);
// The loss and its metrics.
void policy_loss_results(Call& call, PolicyLossArgs& a);

}  // namespace p2r::binding
