// The noise of canvasmar-rt: Philox4x64-10, key (seed, stream), counter (0, 0, purpose, frame).
// docs/embedding.md has the definition and test vectors.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace noise {

enum Purpose : std::uint64_t { kFlow = 0, kFrame = 1, kCanvas = 2, kOrder = 3 };

// The 64-bit words of one key, one at a time.
class Philox {
 public:
  Philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t frame, std::uint64_t purpose)
      : key_{seed, stream}, counter_{0, 0, purpose, frame} {}

  std::uint64_t word() {
    if (at_ == 4) refill();
    return block_[at_++];
  }

  // In (0, 1), exact.
  double uniform() { return (static_cast<double>(word() >> 12) + 0.5) * 0x1p-52; }

 private:
  static std::uint64_t high(std::uint64_t a, std::uint64_t b) {  // of the 128-bit product
    const std::uint64_t low32 = 0xFFFFFFFFu;
    const std::uint64_t middle = (a >> 32) * (b & low32) + ((a & low32) * (b & low32) >> 32);
    const std::uint64_t cross = (a & low32) * (b >> 32) + (middle & low32);
    return (a >> 32) * (b >> 32) + (middle >> 32) + (cross >> 32);
  }

  void refill() {
    for (auto& word : counter_)  // incremented before each block, with carry
      if (++word) break;
    std::uint64_t c0 = counter_[0], c1 = counter_[1], c2 = counter_[2], c3 = counter_[3];
    std::uint64_t k0 = key_[0], k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t m0 = 0xD2E7470EE14C6C93u, m1 = 0xCA5A826395121157u;
      const std::uint64_t next0 = high(m1, c2) ^ c1 ^ k0, next2 = high(m0, c0) ^ c3 ^ k1;
      c1 = m1 * c2, c3 = m0 * c0, c0 = next0, c2 = next2;
      k0 += 0x9E3779B97F4A7C15u, k1 += 0xBB67AE8584CAA73Bu;
    }
    block_[0] = c0, block_[1] = c1, block_[2] = c2, block_[3] = c3;
    at_ = 0;
  }

  std::uint64_t key_[2], counter_[4], block_[4];
  int at_ = 4;
};

// Standard normals, two from each pair of uniforms (Box-Muller, cosine first).
inline std::vector<float> normals(Philox source, std::size_t count) {
  std::vector<float> out;
  while (out.size() < count) {
    const double radius = std::sqrt(-2.0 * std::log(source.uniform()));
    const double angle = 2.0 * 3.14159265358979323846 * source.uniform();
    out.push_back(static_cast<float>(radius * std::cos(angle)));
    out.push_back(static_cast<float>(radius * std::sin(angle)));
  }
  out.resize(count);
  return out;
}

inline std::vector<float> gumbel(Philox source, std::size_t count) {
  std::vector<float> out(count);
  for (float& value : out) value = static_cast<float>(-std::log(-std::log(source.uniform())));
  return out;
}

}  // namespace noise
