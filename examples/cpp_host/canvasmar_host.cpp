// Continues a video with a canvasmar-rt bundle and ONNX Runtime alone, frame for frame as Python
// does. docs/embedding.md says what every tensor and number here means.

#include <onnxruntime_cxx_api.h>
#include <openssl/evp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "noise.h"
#include "schedule.h"

namespace schedule {
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Sampling, ar_steps, flow_steps, solver, order, temporal_guidance,
                                   canvas_guidance, frame_noise, canvas_noise, temperature)
}

namespace fs = std::filesystem;
using json = nlohmann::json;
using schedule::Sampling;
using Shape = std::vector<std::int64_t>;
using Values = std::map<std::string, Ort::Value>;
using Picture = std::vector<unsigned char>;  // RGB, (H, W, 3)
using Action = std::optional<std::vector<float>>;

constexpr int kSchemaVersion = 2;
constexpr float kMasked = -1e4f;
constexpr std::uint64_t kMostThreads = 1024;
constexpr int kMostSteps = 1000;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;

// What the user can put right; the message says how.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// -- the bundle

std::string sha256(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> hash(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  EVP_DigestInit_ex(hash.get(), EVP_sha256(), nullptr);
  std::vector<char> block(1 << 20);
  while (file.read(block.data(), static_cast<std::streamsize>(block.size())), file.gcount() > 0)
    EVP_DigestUpdate(hash.get(), block.data(), static_cast<std::size_t>(file.gcount()));
  unsigned char digest[32];
  EVP_DigestFinal_ex(hash.get(), digest, nullptr);
  std::string hex;
  for (unsigned char byte : digest) {
    char pair[3];
    std::snprintf(pair, sizeof pair, "%02x", byte);
    hex += pair;
  }
  return hex;
}

struct Bundle {
  fs::path root;
  json manifest;

  bool has(const std::string& component) const {
    return manifest.at("components").contains(component);
  }

  // Shape of an input at batch 1.
  Shape shape(const std::string& component, const std::string& input) const {
    for (const json& entry : manifest.at("components").at(component).at("inputs")) {
      if (entry.at("name") != input) continue;
      Shape shape;
      for (const json& dim : entry.at("dims")) {
        shape.push_back(dim == "B" ? 1 : dim.get<std::int64_t>());
        if (shape.back() < 1) throw wrong(component, input);
      }
      return shape;
    }
    throw Failure("manifest: " + component + " has no input " + input + "; export it again");
  }

  // One dimension of it, of so many.
  std::int64_t dim(const std::string& component, const std::string& input, std::size_t index,
                   std::size_t rank) const {
    const Shape found = shape(component, input);
    if (found.size() != rank) throw wrong(component, input);
    return found[index];
  }

 private:
  static Failure wrong(const std::string& component, const std::string& input) {
    return Failure("manifest: the shape of " + component + "'s " + input +
                   " makes no sense; copy or export the bundle again");
  }
};

// Reads the manifest and checks every file it lists: inside the bundle, of its size and its hash.
Bundle open_bundle(const fs::path& directory) {
  const fs::path path = directory / "canvasmar_config.json";
  std::ifstream file(path);
  if (!file)
    throw Failure(path.string() + ": not found; give the folder of a bundle, which 'canvasmar-rt " +
                  "export PRESET --output DIR' makes");
  Bundle bundle{fs::canonical(directory), json::parse(file)};
  const json& version = bundle.manifest.at("schema_version");
  if (version != kSchemaVersion)
    throw Failure(path.string() + ": schema version " + version.dump() + ", this program reads " +
                  std::to_string(kSchemaVersion) +
                  "; export the bundle with a matching canvasmar-rt");
  for (const auto& [name, entry] : bundle.manifest.at("files").items()) {
    const fs::path listed = fs::weakly_canonical(bundle.root / name);
    const fs::path inside = listed.lexically_relative(bundle.root);
    if (inside.empty() || *inside.begin() == "..")
      throw Failure(name + " lies outside the bundle; refused: get it again from a trusted source");
    if (!fs::is_regular_file(listed))
      throw Failure(listed.string() + " is missing; copy or export the bundle again");
    if (fs::file_size(listed) != entry.at("bytes") || sha256(listed) != entry.at("sha256"))
      throw Failure(listed.string() + " does not match its hash in the manifest: it is " +
                    "incomplete or was changed; copy or export the bundle again");
  }
  for (const auto& [name, component] : bundle.manifest.at("components").items())
    if (!bundle.manifest.at("files").contains(component.at("file").get<std::string>()))
      throw Failure(name + ": its graph is not a listed file; export the bundle again");
  const std::string family = bundle.manifest.at("model").value("family", "canvasmar");
  if (family != "canvasmar" || !bundle.manifest.at("components").contains("frame"))
    throw Failure(path.string() + ": this host draws single frames of CanvasMAR; run next-group " +
                  "and unified models from Python");
  return bundle;
}

// Sampling options of the manifest, which may have been edited.
Sampling checked(const json& given) {
  const auto refuse = [&](const std::string& name, const std::string& wanted) {
    throw Failure("manifest: " + name + " must be " + wanted + ", got " + given.at(name).dump());
  };
  for (const char* name : {"ar_steps", "flow_steps"}) {
    const json& steps = given.at(name);
    if (!steps.is_number_integer() || steps < 1 || steps > kMostSteps)
      refuse(name, "a whole number from 1 to " + std::to_string(kMostSteps));
  }
  const auto within = [&](const std::string& name, double most) {
    const json& value = given.at(name);
    if (!value.is_number() || !(value >= 0.0 && value <= most))
      refuse(name, "a number from 0 to " + std::to_string(static_cast<int>(most)));
  };
  for (const char* name : {"frame_noise", "canvas_noise"}) within(name, 1);
  for (const char* name : {"temporal_guidance", "canvas_guidance", "temperature"})
    within(name, 10000);
  const Sampling sampling = given.get<Sampling>();
  const auto one_of = [](const std::string& text, const std::vector<std::string>& names) {
    return std::find(names.begin(), names.end(), text) != names.end();
  };
  if (!one_of(sampling.solver, {"euler", "heun", "ab2"})) refuse("solver", "euler, heun or ab2");
  if (!one_of(sampling.order, {"motion", "maskgit", "random"}))
    refuse("order", "motion, maskgit or random");
  if (given.value("flow_temperature", json{1.0, 1.0}) != json{1.0, 1.0})
    refuse("flow_temperature", "[1, 1] for this host; Python has it");
  return sampling;
}

// The sampling options called `name`: default or fast.
Sampling profile(const Bundle& bundle, const std::string& name) {
  const json& fast = bundle.manifest.at("fast");
  if (name == "default") return checked(bundle.manifest.at("sampling"));
  if (name != "fast" || fast.is_null())
    throw Failure("no profile " + name + "; this bundle has default" +
                  (fast.is_null() ? "" : " and fast"));
  return checked(fast);
}

// -- tensors

// Of a kFloat or kHalf tensor.
std::size_t byte_size(const Ort::Value& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  return info.GetElementCount() * (info.GetElementType() == kHalf ? 2 : 4);
}

Ort::Value zeros(const Shape& shape, ONNXTensorElementDataType type) {
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type);
  std::memset(value.GetTensorMutableRawData(), 0, byte_size(value));
  return value;
}

template <typename T>
Ort::Value tensor(const Shape& shape, const std::vector<T>& values) {
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value out = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
  if (out.GetTensorTypeAndShapeInfo().GetElementCount() != values.size())
    throw std::logic_error("a tensor was given the wrong number of values");
  std::copy(values.begin(), values.end(), out.GetTensorMutableData<T>());
  return out;
}

std::vector<float> floats(const Ort::Value& value) {
  const float* data = value.GetTensorData<float>();
  return {data, data + value.GetTensorTypeAndShapeInfo().GetElementCount()};
}

// The first `rows` of a tensor, in its memory.
Ort::Value head(Ort::Value& value, std::int64_t rows) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  Shape shape = info.GetShape();
  const std::size_t bytes = byte_size(value) / shape[0] * rows;
  shape[0] = rows;
  return Ort::Value::CreateTensor(
      Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault),
      value.GetTensorMutableRawData(), bytes, shape.data(), shape.size(), info.GetElementType());
}

// The rows of two tensors, one after the other.
Ort::Value joined(const Ort::Value& first, const Ort::Value& second) {
  const auto info = first.GetTensorTypeAndShapeInfo();
  Shape shape = info.GetShape();
  shape[0] += second.GetTensorTypeAndShapeInfo().GetShape()[0];
  Ort::Value out = zeros(shape, info.GetElementType());
  char* place = static_cast<char*>(out.GetTensorMutableRawData());
  std::memcpy(place, first.GetTensorRawData(), byte_size(first));
  std::memcpy(place + byte_size(first), second.GetTensorRawData(), byte_size(second));
  return out;
}

// -- the loop

// One video being predicted (batch 1).
class Rollout {
 public:
  // `fused`: run frame.onnx, whose AR steps and order are those of the profile `default`.
  // `threads` of a graph, 0 for ONNX Runtime's own choice.
  Rollout(Bundle bundle, Sampling sampling, bool fused, std::uint64_t seed, std::uint64_t stream,
          int threads)
      : bundle_(std::move(bundle)),
        sampling_(std::move(sampling)),
        fused_(fused),
        seed_(seed),
        stream_(stream) {
    compression = bundle_.dim("encoder", "frames", 1, 5);
    height = bundle_.dim("encoder", "frames", 2, 5);
    width = bundle_.dim("encoder", "frames", 3, 5);
    action_size = bundle_.manifest.at("model").at("action_dim").get<std::size_t>();
    tokens_ = static_cast<int>(bundle_.dim(fused_ ? "frame" : "flow", "flow_noise", 1, 3));
    if (sampling_.ar_steps > tokens_)
      throw Failure("manifest: ar_steps must be at most the tokens of a frame, " +
                    std::to_string(tokens_) + ", got " + std::to_string(sampling_.ar_steps));
    ring_ = bundle_.dim("temporal", "cache_bias", 1, 2);
    const std::string dtype = bundle_.manifest.at("dtype");
    if (dtype == "bfloat16")
      throw Failure("a bfloat16 bundle runs on a GPU only; export with --dtype fp32 or fp16");
    if (dtype != "float16" && dtype != "float32")
      throw Failure("manifest: dtype must be float32 or float16, got " + dtype);
    hidden_ = dtype == "float16" ? kHalf : kFloat;
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
    options.SetIntraOpNumThreads(threads);
    // graphs run in turn: threads that spin after one take the cores from the next
    options.AddConfigEntry("session.force_spinning_stop", "1");
    for (const auto& [name, entry] : bundle_.manifest.at("components").items()) {
      const bool always = name == "encoder" || name == "temporal" || name == "decoder";
      if (!always && fused_ != (name == "frame")) continue;
      const fs::path file = bundle_.root / entry.at("file").get<std::string>();
      sessions_.try_emplace(name, environment_, file.c_str(), options);
      check_tensors(name, entry);
    }
    values_["latent"] = zeros(bundle_.shape("decoder", "latent"), kFloat);
    add_zero_states("temporal", "cache_", values_);
    add_zero_states("encoder", "state_", encoder_);
    add_zero_states("decoder", "state_", decoder_);
    add_constants();
  }

  // One latent frame of what really happened, from `compression` pictures, or one for the first.
  void observe(const std::vector<Picture>& pictures, const Action& action) {
    advance(action);
    Picture group;
    for (std::int64_t i = 0; i < compression; ++i) {
      const Picture& picture = pictures.size() == 1 ? pictures[0] : pictures.at(i);
      group.insert(group.end(), picture.begin(), picture.end());
    }
    encoder_["frames"] = tensor<std::uint8_t>(bundle_.shape("encoder", "frames"), group);
    run("encoder", encoder_);
    keep_states(encoder_);
    values_["latent"] = std::move(encoder_["latent"]);
    decode();
  }

  // Predicts the next latent frame; its `compression` pictures.
  std::vector<Picture> step(const Action& action) {
    const auto frame = static_cast<std::uint64_t>(time_);
    draw_noise(frame);
    if (fused_) {
      tell(action);
      run("frame", values_);
      keep_cache();
      values_["latent"] = std::move(values_["next_latent"]);
    } else {
      advance(action);
      draw_tokens();
    }
    for (float value : floats(values_["latent"]))
      if (!std::isfinite(value))
        throw Failure("frame " + std::to_string(frame) + ": values that are not finite; run " +
                      "'canvasmar-rt verify' on this bundle");
    return decode();
  }

  std::int64_t compression = 0, height = 0, width = 0;
  std::size_t action_size = 0;

 private:
  // Refuses a graph whose inputs and outputs are not those that the manifest lists.
  void check_tensors(const std::string& component, const json& entry) const {
    const Ort::Session& session = sessions_.at(component);
    Ort::AllocatorWithDefaultOptions allocator;
    const json &inputs = entry.at("inputs"), &outputs = entry.at("outputs");
    bool same = inputs.size() == session.GetInputCount() &&
                outputs.size() == session.GetOutputCount();
    for (std::size_t i = 0; same && i < inputs.size(); ++i)
      same = lists(inputs.at(i), session.GetInputNameAllocated(i, allocator).get(),
                   session.GetInputTypeInfo(i));
    for (std::size_t i = 0; same && i < outputs.size(); ++i)
      same = lists(outputs.at(i), session.GetOutputNameAllocated(i, allocator).get(),
                   session.GetOutputTypeInfo(i));
    if (!same)
      throw Failure("manifest: the tensors of " + component +
                    " are not its graph's; copy or export the bundle again");
  }

  static bool lists(const json& entry, const std::string& name, const Ort::TypeInfo& type) {
    const Shape shape = type.GetTensorTypeAndShapeInfo().GetShape();
    const json& dims = entry.at("dims");
    if (entry.at("name") != name || dims.size() != shape.size()) return false;
    for (std::size_t i = 0; i < shape.size(); ++i)  // what is no number, such as B, is free
      if (dims.at(i).is_number() && dims.at(i) != shape[i]) return false;
    return true;
  }

  // Runs a graph over named values: inputs are read from `values`, outputs are put there.
  void run(const std::string& component, Values& values) {
    const json& entry = bundle_.manifest.at("components").at(component);
    Ort::Session& session = sessions_.at(component);
    Ort::IoBinding binding(session);
    for (const json& input : entry.at("inputs")) {
      const std::string name = input.at("name");
      const auto value = values.find(name);
      if (value == values.end() || !value->second)
        throw Failure("manifest: " + component + " has an input this program does not know, " +
                      name + "; export the bundle with a matching canvasmar-rt");
      binding.BindInput(name.c_str(), value->second);
    }
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    for (const json& output : entry.at("outputs"))
      binding.BindOutput(output.at("name").get<std::string>().c_str(), memory);
    session.Run(Ort::RunOptions{nullptr}, binding);
    std::vector<Ort::Value> made = binding.GetOutputValues();
    for (std::size_t i = 0; i < made.size(); ++i)
      values[entry.at("outputs")[i].at("name")] = std::move(made[i]);
  }

  void add_zero_states(const std::string& component, const std::string& prefix, Values& values) {
    for (const json& entry : bundle_.manifest.at("components").at(component).at("inputs")) {
      const std::string name = entry.at("name");
      if (name.rfind(prefix, 0) == 0 && name != "cache_bias")
        values[name] = zeros(bundle_.shape(component, name), hidden_);
    }
  }

  // What only the sampling options decide: guidance branches, noise levels, the flow solver.
  void add_constants() {
    const auto put = [&](const std::string& name, const std::vector<float>& values) {
      values_[name] = tensor<float>({static_cast<std::int64_t>(values.size())}, values);
    };
    const auto branches = schedule::guidance_branches(sampling_, bundle_.has("canvas"));
    put("temporal_on", branches.temporal_on);
    put("canvas_on", branches.canvas_on);
    put("branch_weight", branches.weight);
    const auto plan = schedule::flow_plan(sampling_);
    put("flow_time", plan.time);
    put("step_new", plan.step_new);
    put("step_old", plan.step_old);
    values_["frame_noise_level"] = tensor<float>({}, {static_cast<float>(sampling_.frame_noise)});
    values_["canvas_noise_level"] = tensor<float>({}, {static_cast<float>(sampling_.canvas_noise)});
  }

  // What the Temporal ViT is told of frame `time_`: its angles, the slots it may see, the action.
  void tell(const Action& action) {
    const std::int64_t pairs = bundle_.dim("temporal", "time", 1, 2);
    std::vector<float> bias(ring_, kMasked);
    for (std::int64_t slot = 0; slot < std::min(time_, ring_); ++slot)
      if (slot != time_ % ring_) bias[slot] = 0.0f;
    values_["is_first"] = tensor<float>({1}, {time_ == 0 ? 1.0f : 0.0f});
    values_["time"] = tensor<float>({2, pairs}, schedule::time_rotation(time_, pairs));
    values_["cache_bias"] = tensor<float>({1, ring_}, bias);
    const auto size = static_cast<std::int64_t>(action_size);
    values_["action_given"] = tensor<float>({1}, {action ? 1.0f : 0.0f});
    values_["action"] = tensor<float>({1, size}, action.value_or(std::vector<float>(action_size)));
  }

  // Feeds the latest latent frame to the Temporal ViT.
  void advance(const Action& action) {
    tell(action);
    run("temporal", values_);
    keep_cache();
  }

  // Puts the new keys and values in the ring's slot of this frame; the frame is over.
  void keep_cache() {
    const std::int64_t slot = time_ % ring_;
    for (auto& [name, ring] : values_) {
      if (name.rfind("cache_key_", 0) != 0 && name.rfind("cache_value_", 0) != 0) continue;
      const Ort::Value& row = values_.at("new_" + name.substr(6));
      char* slots = static_cast<char*>(ring.GetTensorMutableRawData());
      std::memcpy(slots + slot * byte_size(row), row.GetTensorRawData(), byte_size(row));
    }
    ++time_;
  }

  void draw_noise(std::uint64_t frame) {
    const auto normals = [&](const char* component, const char* input, noise::Purpose purpose,
                             double level) {
      const Shape shape = bundle_.shape(fused_ ? "frame" : component, input);
      std::size_t count = 1;
      for (std::int64_t dim : shape) count *= static_cast<std::size_t>(dim);
      std::vector<float> drawn(level > 0 ? 0 : count);
      if (level > 0) drawn = noise::normals({seed_, stream_, frame, purpose}, count);
      values_[input] = tensor<float>(shape, drawn);
    };
    normals("flow", "flow_noise", noise::kFlow, 1.0);
    if (bundle_.has("canvas")) {
      normals("canvas", "frame_noise", noise::kFrame, sampling_.frame_noise);
      normals("canvas", "canvas_noise", noise::kCanvas, sampling_.canvas_noise);
    }
    const std::size_t count = static_cast<std::size_t>(sampling_.ar_steps) * tokens_;
    order_noise_ = noise::gumbel({seed_, stream_, frame, noise::kOrder}, count);
    values_["order_noise"] = tensor<float>({1, sampling_.ar_steps, tokens_}, order_noise_);
  }

  // The rest of a frame from the component graphs.
  void draw_tokens() {
    std::vector<float> staticness;
    if (bundle_.has("canvas")) {
      run("canvas", values_);
      staticness = floats(values_["staticness"]);
      if (staticness.size() != static_cast<std::size_t>(tokens_))
        throw Failure("manifest: the shape of flow's flow_noise is not the canvas's");
    }
    if (bundle_.has("condition")) run("condition", values_);
    const auto order = schedule::generation_order(staticness, order_noise_, sampling_, tokens_);
    const auto part = [&](std::int64_t first, std::int64_t last) {
      return tensor<std::int64_t>({1, last - first}, {order.begin() + first, order.begin() + last});
    };
    // A residual model adds what it draws to the latest latent frame.
    values_["partial"] = bundle_.manifest.at("model").value("residual", false)
                             ? std::move(values_["latent"])
                             : zeros(bundle_.shape("flow", "partial"), kFloat);
    std::int64_t known = 0;
    for (int size : schedule::set_sizes(tokens_, sampling_.ar_steps)) {
      values_["select_index"] = part(known, known + size);
      values_["mask_index"] = part(known, tokens_);
      values_["known_index"] = part(0, known);
      if (known)
        run("spatial", values_);
      else
        embed_first();
      run("flow", values_);
      values_["partial"] = std::move(values_["next_partial"]);
      known += size;
    }
    values_["latent"] = std::move(values_["partial"]);
  }

  // The embeddings of the first set; those of a guidance branch that sees nothing, the last if
  // there is one, are looked up.
  void embed_first() {
    const auto on = floats(values_.at("temporal_on")), canvas_on = floats(values_.at("canvas_on"));
    std::int64_t seeing = 0;
    for (std::size_t i = 0; i < on.size(); ++i) seeing += on[i] > 0 || canvas_on[i] > 0;
    if (seeing == static_cast<std::int64_t>(on.size())) return run("spatial_first", values_);
    run("unconditional", values_);
    if (seeing == 0) return;
    const Ort::Value found = std::move(values_.at("z_tokens"));
    Values whole;
    for (const json& input : bundle_.manifest.at("components").at("spatial_first").at("inputs")) {
      if (input.at("dims").empty() || input.at("dims")[0] != "G") continue;
      const std::string name = input.at("name");
      whole[name] = std::move(values_.at(name));
      values_[name] = head(whole[name], seeing);
    }
    run("spatial_first", values_);
    for (auto& [name, value] : whole) values_[name] = std::move(value);
    values_["z_tokens"] = joined(values_.at("z_tokens"), found);
  }

  // Decodes the latest latent frame; also what keeps the decoder's histories up to date.
  std::vector<Picture> decode() {
    decoder_["latent"] = std::move(values_["latent"]);
    run("decoder", decoder_);
    keep_states(decoder_);
    values_["latent"] = std::move(decoder_["latent"]);
    const unsigned char* pixels = decoder_["frames"].GetTensorData<std::uint8_t>();
    std::vector<Picture> pictures;
    for (std::int64_t i = 0, size = height * width * 3; i < compression; ++i)
      pictures.emplace_back(pixels + i * size, pixels + (i + 1) * size);
    return pictures;
  }

  // The histories just made are read next time.
  static void keep_states(Values& values) {
    for (auto& [name, value] : values)
      if (name.rfind("state_", 0) == 0) value = std::move(values.at("next_" + name));
  }

  Bundle bundle_;
  Sampling sampling_;
  bool fused_;
  std::uint64_t seed_, stream_;
  int tokens_ = 0;
  std::int64_t time_ = 0, ring_ = 0;
  ONNXTensorElementDataType hidden_;
  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "canvasmar_host"};
  std::map<std::string, Ort::Session> sessions_;
  Values values_, encoder_, decoder_;  // the autoencoder's histories have the same names
  std::vector<float> order_noise_;
};

// -- files

// All pictures of a file of PPM images (P6), one after the other, of the given size.
std::vector<Picture> read_ppm(const std::string& path, std::int64_t width, std::int64_t height) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(path + ": cannot be read");
  std::vector<Picture> pictures;
  for (std::string magic; file >> magic;) {
    std::int64_t w = 0, h = 0, most = 0;
    file >> w >> h >> most;
    file.get();  // one white space before the pixels
    const std::string wanted = std::to_string(width) + "x" + std::to_string(height);
    if (magic != "P6" || w != width || h != height || most != 255)
      throw Failure(path + ": expected P6 images of " + wanted + " with 255 levels; make them " +
                    "with 'ffmpeg -i CLIP -s " + wanted + " -f image2pipe -c:v ppm " + path + "'");
    Picture picture(static_cast<std::size_t>(w * h * 3));
    const auto size = static_cast<std::streamsize>(picture.size());
    if (!file.read(reinterpret_cast<char*>(picture.data()), size))
      throw Failure(path + ": ends in the middle of a picture; make it again");
    pictures.push_back(std::move(picture));
  }
  return pictures;
}

// One action a line, numbers with spaces between.
std::vector<std::vector<float>> read_actions(const std::string& path, std::size_t size) {
  std::ifstream file(path);
  if (!file) throw Failure(path + ": cannot be read");
  std::vector<std::vector<float>> actions;
  std::size_t read = 0;
  bool blank = false;
  for (std::string line; std::getline(file, line);) {
    ++read;
    std::istringstream words(line);
    std::vector<float> action;
    bool numbers = true;
    for (std::string word; words >> word;) {
      char* end = nullptr;
      action.push_back(std::strtof(word.c_str(), &end));
      const bool whole = end == word.c_str() + word.size();  // a NUL ends what strtof reads
      numbers = numbers && whole && std::isfinite(action.back());
    }
    if (action.empty()) {  // only at the end
      blank = true;
      continue;
    }
    if (action.size() != size || !numbers || blank)
      throw Failure(path + ": line " + std::to_string(blank ? read - 1 : read) +
                    " should hold " + std::to_string(size) + " numbers");
    actions.push_back(std::move(action));
  }
  return actions;
}

std::uint64_t whole_number(const std::string& name, const std::string& text) {
  std::size_t end = 0;
  std::uint64_t value = 0;
  try {
    value = std::stoull(text, &end);
  } catch (const std::logic_error&) {
  }
  if (end == 0 || end != text.size() || text[0] == '-')
    throw Failure(name + ": expected a whole number, got '" + text + "'");
  return value;
}

const char kPart[] = ".part";

// What a link leads to; a pipe under /dev or /proc has no other name.
fs::path behind(const fs::path& path) {
  std::error_code nowhere;
  const fs::path found = fs::weakly_canonical(path, nowhere);
  return nowhere ? path : found;
}

// A file that takes its name once it is whole, or a pipe, such as /dev/stdout. A link stays one.
class Output {
 public:
  explicit Output(const std::string& path)
      : path_(behind(path)),
        part_(path_.string() + (fs::exists(path) && !fs::is_regular_file(path) ? "" : kPart)) {
    file_.open(part_, std::ios::binary);
    check();
  }
  ~Output() {
    std::error_code ignored;
    if (file_.is_open() && part_ != path_) fs::remove(part_, ignored);
  }

  void write(const Picture& picture, std::int64_t width, std::int64_t height) {
    file_ << "P6\n" << width << " " << height << "\n255\n";
    file_.write(reinterpret_cast<const char*>(picture.data()),
                static_cast<std::streamsize>(picture.size()));
    check();
  }

  void finish() {
    file_.flush();
    check();
    file_.close();
    if (part_ != path_) fs::rename(part_, path_);
  }

 private:
  void check() {
    if (!file_) throw Failure(path_.string() + ": cannot be written");
  }

  fs::path path_, part_;
  std::ofstream file_;
};

// -- commands

const char kUsage[] =
    "usage: canvasmar_host BUNDLE CONTEXT.ppm OUT.ppm [--frames 8] [--seed 0] [--stream 0]\n"
    "                      [--profile fast] [--actions FILE] [--threads N]\n"
    "       canvasmar_host noise SEED STREAM FRAME PURPOSE\n"
    "CONTEXT.ppm holds 1 + n*t PPM images, --frames are latent frames, FILE holds one action a\n"
    "line: n for the context, then one for each frame. 'noise' prints test vectors.\n";

void print_noise(const std::vector<std::string>& arguments) {
  std::uint64_t key[4];
  for (int i = 0; i < 4; ++i) key[i] = whole_number("noise", arguments[i]);
  noise::Philox source(key[0], key[1], key[2], key[3]);
  const std::vector<float> normals = noise::normals(source, 6), gumbel = noise::gumbel(source, 6);
  for (int i = 0; i < 6; ++i)
    std::printf("%016llx %.9g %.9g\n", static_cast<unsigned long long>(source.word()), normals[i],
                gumbel[i]);
}

// 0 where none are asked for.
int thread_count(const std::string& text) {
  if (text.empty()) return 0;
  const std::uint64_t count = whole_number("--threads", text);
  if (count < 1 || count > kMostThreads)
    throw Failure("--threads: expected 1 to " + std::to_string(kMostThreads) + ", got " + text +
                  "; leave it out for ONNX Runtime's own choice");
  return static_cast<int>(count);
}

void predict(const std::vector<std::string>& files,
             const std::map<std::string, std::string>& options) {
  for (const std::string& input : {files[1], options.at("--actions")}) {
    std::error_code missing;  // which is told where the file is read
    for (const std::string& written : {files[2], behind(files[2]).string() + kPart})
      if (!input.empty() && fs::equivalent(input, written, missing))
        throw Failure(written + ": is an input; give another output");
  }
  const int threads = thread_count(options.at("--threads"));
  Bundle bundle = open_bundle(files[0]);
  const fs::path inside = behind(files[2]).lexically_relative(bundle.root);
  if (!inside.empty() && *inside.begin() != "..")
    throw Failure(files[2] + ": lies in the bundle; give another output");
  std::string name = options.at("--profile");
  if (name.empty()) name = bundle.manifest.at("fast").is_null() ? "default" : "fast";
  const Sampling sampling = profile(bundle, name);
  const std::uint64_t seed = whole_number("--seed", options.at("--seed"));
  const std::uint64_t stream = whole_number("--stream", options.at("--stream"));
  const std::uint64_t count = whole_number("--frames", options.at("--frames"));
  Rollout rollout(std::move(bundle), sampling, name == "default", seed, stream, threads);

  const std::vector<Picture> context = read_ppm(files[1], rollout.width, rollout.height);
  const auto t = static_cast<std::size_t>(rollout.compression);
  if (context.empty() || (context.size() - 1) % t)
    throw Failure(files[1] + ": holds " + std::to_string(context.size()) + " images; 1 + n*" +
                  std::to_string(t) + " are needed");
  const std::size_t known = (context.size() - 1) / t;
  std::vector<std::vector<float>> actions;  // none, or all
  if (const std::string& path = options.at("--actions"); !path.empty()) {
    actions = read_actions(path, rollout.action_size);
    if (actions.size() < known || actions.size() - known != count)
      throw Failure(path + ": " + std::to_string(actions.size()) + " actions, " +
                    std::to_string(known) + " for the context and " + std::to_string(count) +
                    " for the prediction are needed");
  }
  const auto action = [&](std::size_t i) {
    return actions.empty() ? Action() : Action(actions.at(i));
  };
  Output out(files[2]);
  rollout.observe({context[0]}, std::nullopt);
  for (std::size_t i = 0; i < known; ++i)
    rollout.observe({context.begin() + 1 + i * t, context.begin() + 1 + (i + 1) * t}, action(i));

  std::vector<double> milliseconds;
  for (std::size_t i = 0; i < count; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<Picture> pictures = rollout.step(action(known + i));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    milliseconds.push_back(took.count());
    for (const Picture& picture : pictures) out.write(picture, rollout.width, rollout.height);
  }
  out.finish();
  std::sort(milliseconds.begin(), milliseconds.end());
  if (count)
    std::fprintf(stderr, "%zu latent frames, profile %s, median %.1f ms each\n",
                 milliseconds.size(), name.c_str(), milliseconds[count / 2]);
}

int main(int argc, char** argv) {
#ifndef _WIN32
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // ONNX Runtime's builds of 1.32 report to their maker
#endif
  std::vector<std::string> positional;
  std::map<std::string, std::string> options = {
      {"--frames", "8"}, {"--seed", "0"},   {"--stream", "0"},
      {"--profile", ""}, {"--actions", ""}, {"--threads", ""}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--", 0) != 0) {
      positional.push_back(argument);
    } else if (options.count(argument) && i + 1 < argc) {
      options[argument] = argv[++i];
    } else {
      std::cerr << kUsage;
      return 2;
    }
  }
  try {
    if (positional.size() == 5 && positional[0] == "noise") {
      print_noise({positional.begin() + 1, positional.end()});
    } else if (positional.size() == 3) {
      if (!OrtGetApiBase()->GetApi(ORT_API_VERSION))
        throw Failure("this ONNX Runtime (" + std::string(OrtGetApiBase()->GetVersionString()) +
                      ") is older than the headers this program was built with; install a newer " +
                      "one");
      predict(positional, options);
    } else {
      std::cerr << kUsage;
      return 2;
    }
  } catch (const json::exception& error) {
    std::cerr << "canvasmar_host: manifest: " << error.what()
              << "; copy or export the bundle again\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "canvasmar_host: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
