// What is fixed before a frame is drawn: sizes of the AR steps, token order, guidance branches,
// flow solver, angles of time. The numbers of canvasmar_rt/schedule.py; docs/embedding.md has them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace schedule {

// A sampling profile of the manifest.
struct Sampling {
  int ar_steps, flow_steps;
  std::string solver, order;
  double temporal_guidance, canvas_guidance, frame_noise, canvas_noise, temperature;
};

// Tokens drawn in each AR step: a cosine schedule, at least one in every step.
inline std::vector<int> set_sizes(int tokens, int steps) {
  std::vector<int> sizes;
  int known = 0;
  for (int k = 1; k <= steps; ++k) {
    const double angle = std::acos(-1.0) / 2 * k / steps;
    int target = tokens - static_cast<int>(std::floor(tokens * std::cos(angle) + 1e-9));
    target = std::min(std::max(target, known + 1), tokens - (steps - k));
    sizes.push_back(target - known);
    known = target;
  }
  return sizes;
}

// The tokens in the order in which they are drawn: each AR step takes its best among those left.
// `staticness` (N) is empty without a canvas; `gumbel` is (K, N).
inline std::vector<std::int64_t> generation_order(const std::vector<float>& staticness,
                                                  const std::vector<float>& gumbel,
                                                  const Sampling& sampling, int tokens) {
  const bool random = sampling.order == "random" || staticness.empty();
  std::vector<std::int64_t> order, left(tokens);
  std::iota(left.begin(), left.end(), 0);
  const std::vector<int> sizes = set_sizes(tokens, sampling.ar_steps);
  for (std::size_t k = 0; k < sizes.size(); ++k) {
    const double part = static_cast<double>(k + 1) / sampling.ar_steps;
    const double rising = sampling.order == "motion" ? part : 1.0 - part;
    const float tau =
        random ? 1.0f : static_cast<float>(sampling.temperature) * static_cast<float>(rising);
    std::vector<float> score(tokens);
    for (int i = 0; i < tokens; ++i) {
      score[i] = tau * gumbel[k * tokens + i];
      if (!random) score[i] += std::log(std::max(staticness[i], 1e-6f));
    }
    std::sort(left.begin(), left.end(), [&](std::int64_t a, std::int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : a < b;
    });
    order.insert(order.end(), left.begin(), left.begin() + sizes[k]);
    left.erase(left.begin(), left.begin() + sizes[k]);
  }
  return order;
}

// Guidance branches that are computed; one whose weight vanishes is not.
struct Branches {
  std::vector<float> temporal_on, canvas_on, weight;
};

inline Branches guidance_branches(const Sampling& sampling, bool has_canvas) {
  const double w_t = sampling.temporal_guidance;
  const double w_s = has_canvas ? sampling.canvas_guidance : 0.0;
  const double table[3][3] = {{1, 1, w_s}, {1, 0, w_t - w_s}, {0, 0, 1 - w_t}};
  Branches branches;
  for (const auto& row : table) {
    if (std::abs(row[2]) <= 1e-9) continue;
    branches.temporal_on.push_back(static_cast<float>(row[0]));
    branches.canvas_on.push_back(static_cast<float>(row[1]));
    branches.weight.push_back(static_cast<float>(row[2]));
  }
  return branches;
}

// x <- x + step_new[e] * v_e + step_old[e] * v_(e-1), with v_e evaluated at time[e].
struct FlowPlan {
  std::vector<float> time, step_new, step_old;
};

inline FlowPlan flow_plan(const Sampling& sampling) {
  FlowPlan plan;
  const auto evaluate = [&](double time, double step_new, double step_old) {
    plan.time.push_back(static_cast<float>(time));
    plan.step_new.push_back(static_cast<float>(step_new));
    plan.step_old.push_back(static_cast<float>(step_old));
  };
  const double dt = 1.0 / sampling.flow_steps;
  for (int s = 0; s < sampling.flow_steps; ++s) {
    const bool two_step = sampling.solver == "ab2" && s > 0;
    evaluate(s * dt, two_step ? 1.5 * dt : dt, two_step ? -0.5 * dt : 0.0);
    if (sampling.solver == "heun") evaluate(s * dt + dt, dt / 2, -dt / 2);
  }
  return plan;
}

// Cosines, then sines, of the rotary angles of latent frame `time`.
inline std::vector<float> time_rotation(std::int64_t time, std::int64_t pairs) {
  std::vector<float> rotation(2 * pairs);
  for (std::int64_t i = 0; i < pairs; ++i) {
    const double angle = time * std::pow(100.0, -static_cast<double>(i) / pairs);
    rotation[i] = static_cast<float>(std::cos(angle));
    rotation[pairs + i] = static_cast<float>(std::sin(angle));
  }
  return rotation;
}

}  // namespace schedule
