// Enlarges a picture with the file that `binarize export MODEL upscale.onnx --steps 2` writes, without Python.
//
//   g++ -std=c++17 -O2 upscale.cpp -o upscale -I onnxruntime/include -L onnxruntime/lib -lonnxruntime
//   ./upscale upscale.onnx small.ppm large.ppm
//
// Pictures are binary PPM files (P6, 8 bits), without comments. A release of onnxruntime has both folders.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iostream>
#include <random>
#include <string>
#include <vector>

constexpr int64_t kScale = 2, kMultiple = 4;  // "scale" and "size_multiple" of the file's metadata binarize.sampling

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: upscale MODEL.onnx SMALL.ppm LARGE.ppm");
  std::ifstream small(argv[2], std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  small >> magic >> width >> height >> most;
  std::vector<char> bytes(3 * std::max<int64_t>(width * height, 0));
  if (!small.ignore().read(bytes.data(), bytes.size()) || magic != "P6" || most != 255)
    throw std::runtime_error(std::string(argv[2]) + ": not a binary 8-bit PPM file");

  auto planes = [](std::vector<float>& values, const std::array<int64_t, 4>& shape) {
    static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), shape.data(), shape.size());
  };
  auto padded = [](int64_t side) { return (kScale * side + kMultiple - 1) / kMultiple * kMultiple; };
  std::vector<float> image(bytes.size()), noise(3 * padded(height) * padded(width));
  for (size_t i = 0; i < bytes.size(); i++)  // from pixels to planes of red, green and blue, 0 to 1
    image[i % 3 * (width * height) + i / 3] = static_cast<unsigned char>(bytes[i]) / 255.0f;
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::generate(noise.begin(), noise.end(), [&] { return normal(generator); });

  // --8<-- [start:run]
  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  const char *inputs[] = {"image", "noise"}, *outputs[] = {"enlarged"};
  const Ort::Value given[] = {planes(image, {1, 3, height, width}),
                              planes(noise, {1, 3, padded(height), padded(width)})};
  auto result = session.Run(Ort::RunOptions(), inputs, given, 2, outputs, 1);
  // --8<-- [end:run]

  const float* enlarged = result[0].GetTensorData<float>();
  const int64_t pixels = kScale * height * kScale * width;
  bytes.resize(3 * pixels);
  for (size_t i = 0; i < bytes.size(); i++)
    bytes[i] = static_cast<char>(std::lround(255 * enlarged[i % 3 * pixels + i / 3]));
  std::ofstream large(argv[3], std::ios::binary);
  large << "P6\n" << kScale * width << " " << kScale * height << "\n255\n";
  if (!large.write(bytes.data(), bytes.size())) throw std::runtime_error(std::string(argv[3]) + ": cannot be written");
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
