// convit._C.Inference: a network by its addresses, and the workspaces of its calls; kernels/linear/cpu_infer.py makes and owns the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "infer.h"

namespace py = pybind11;

namespace {

using i64 = std::int64_t;
using Address = std::uintptr_t;
using NormOf = std::tuple<Address, Address, float>;
using ProductOf = std::tuple<Address, Address, i64, i64>;
using LayerOf = std::tuple<i64, float, bool, NormOf, NormOf, ProductOf, ProductOf, ProductOf, ProductOf, Address, Address>;

float* floats(Address x) { return reinterpret_cast<float*>(x); }
convit::Norm norm(const NormOf& x) { return {floats(std::get<0>(x)), floats(std::get<1>(x)), std::get<2>(x)}; }
convit::Product product(const ProductOf& x) {
    return {reinterpret_cast<const void*>(std::get<0>(x)), floats(std::get<1>(x)), std::get<2>(x), std::get<3>(x), nullptr};
}

struct Workspace {
    i64 floats = 0;
    convit::Buffer memory;
};

struct Tables {  // of one grid
    i64 gh, gw;
    std::shared_ptr<const std::vector<convit::Gates>> gates;
};

class Inference {
  public:
    Inference(bool bfloat16, i64 dim, i64 channels, i64 patch_h, i64 patch_w, i64 prefix, i64 local, i64 classes, int pool,
              const ProductOf& patch, const ProductOf& head, Address prefix_tokens, const NormOf& last,
              const std::vector<LayerOf>& layers) {
        for (const LayerOf& x : layers) {
            const convit::Product fc1 = product(std::get<7>(x));
            layers_.push_back({std::get<0>(x), fc1.out, std::get<1>(x), std::get<2>(x), norm(std::get<3>(x)), norm(std::get<4>(x)),
                               product(std::get<5>(x)), product(std::get<6>(x)), fc1, product(std::get<8>(x)), floats(std::get<9>(x)),
                               floats(std::get<10>(x))});
        }
        net_ = {bfloat16 ? convit::DType::bfloat16 : convit::DType::float32, dim, channels, patch_h, patch_w, prefix, local, classes,
                i64(layers_.size()), convit::Pool(pool), product(patch), product(head), floats(prefix_tokens), norm(last), layers_.data()};
        std::vector<convit::Product*> order{&net_.patch};
        for (convit::Layer& x : layers_) order.insert(order.end(), {&x.qkv, &x.proj, &x.fc1, &x.fc2});
        order.push_back(&net_.head);
        for (std::size_t i = 0; i < order.size(); ++i) order[i]->next = order[std::min(i + 1, order.size() - 1)]->weight;
    }

    void run(Address images, Address position, i64 batch, i64 gh, i64 gw, Address out, int threads) {
        py::gil_scoped_release released;
        const auto gates = tables(gh, gw);
        Workspace work = take((convit::infer_workspace(net_, batch, gh, gw, threads) + 3) / 4);
        convit::infer(net_, *gates, floats(images), floats(position), batch, gh, gw, work.memory.get(), floats(out), threads);
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(work));
    }

  private:
    // Made once for each of the last eight grids.
    std::shared_ptr<const std::vector<convit::Gates>> tables(i64 gh, i64 gw) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (const Tables& x : tables_)
                if (x.gh == gh && x.gw == gw) return x.gates;
        }
        Tables made{gh, gw, std::make_shared<const std::vector<convit::Gates>>(convit::infer_gates(net_, gh, gw))};
        const std::lock_guard<std::mutex> lock(mutex_);
        if (tables_.size() == 8) tables_.erase(tables_.begin());
        tables_.push_back(made);
        return made.gates;
    }

    // One that lies idle if there is any; it grows to what is needed, and stays so for the calls that follow.
    Workspace take(i64 size) {
        Workspace work;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!idle_.empty()) {
                work = std::move(idle_.back());
                idle_.pop_back();
            }
        }
        if (work.floats < size) {
            work.memory.reset();
            work = {size, convit::allocate(size)};
        }
        return work;
    }

    std::vector<convit::Layer> layers_;
    convit::Network net_{};
    std::mutex mutex_;
    std::vector<Workspace> idle_;
    std::vector<Tables> tables_;
};

}  // namespace

void bind_infer(py::module_& m) {
    py::class_<Inference>(m, "Inference")
        .def(py::init<bool, i64, i64, i64, i64, i64, i64, i64, int, const ProductOf&, const ProductOf&, Address, const NormOf&,
                      const std::vector<LayerOf>&>())
        .def("run", &Inference::run);
    m.def("infer_why_not", [](bool bfloat16) -> py::object {
        const char* reason = convit::infer_why_not(bfloat16 ? convit::DType::bfloat16 : convit::DType::float32);
        return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
    });
}
