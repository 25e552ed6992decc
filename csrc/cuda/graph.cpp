// A CUDA graph with IF, WHILE and SWITCH nodes, whose conditions earlier kernels set; captured in segments on one
// stream.
//
// The body of a node cannot be captured during the capture of its parent: the capture of the parent ends, the body is
// captured on the same stream, and the capture of the parent continues after the node. With one stream, all segments
// use the same workspaces of the libraries, which are per stream, and the same memory pool.

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "kernels.h"

#if CUDART_VERSION < 12040
#error "IF nodes require CUDA 12.4; build with EARLYEXIT_BUILD=cpu"
#endif

namespace earlyexit {
namespace {

constexpr const char* kOp = "ConditionalGraph";

class ConditionalGraph : public torch::CustomClassHolder {
 public:
  ~ConditionalGraph() override { abandon(); }

  // Starts to capture the current stream; allocations come from a pool of torch.cuda.graph_pool_handle.
  void begin(int64_t device, int64_t pool, int64_t pool_number) {
    EE_CHECK(root_ == nullptr, kOp, "expected begin to be called once, got a second call; create a new graph");
    device_ = static_cast<c10::DeviceIndex>(device);
    stream_ = c10::cuda::getCurrentCUDAStream(device_);
    EE_CHECK(stream_ != c10::cuda::getDefaultCUDAStream(device_), kOp,
             "expected a non-default stream, got the default stream, which cannot be captured");
    pool_ = {static_cast<c10::CaptureId_t>(pool), static_cast<c10::CaptureId_t>(pool_number)};
    const cudaStream_t own = stream_.stream();
    c10::cuda::CUDACachingAllocator::beginAllocateToPool(device_, pool_, [own](cudaStream_t s) { return s == own; });
    holds_pool_ = allocates_ = true;
    C10_CUDA_CHECK(cudaGraphCreate(&root_, 0));
    capture(root_, nullptr);
  }

  // Creates the condition of a node, with the value `first` until a kernel sets it.
  int64_t handle(int64_t first) {
    EE_CHECK(allocates_, kOp, "expected handle to be called between begin and end");
    cudaGraphConditionalHandle created;
    C10_CUDA_CHECK(
        cudaGraphConditionalHandleCreate(&created, root_, static_cast<unsigned>(first), cudaGraphCondAssignDefault));
    EE_CHECK(created != 0, kOp, "expected a handle other than 0, which stands for no handle in the ops");
    return static_cast<int64_t>(created);
  }

  // Work up to end_if runs if the condition is not 0.
  void begin_if(int64_t handle) { open(handle, cudaGraphCondTypeIf, 1); }

  // Work up to end_while runs as long as the condition is not 0.
  void begin_while(int64_t handle) { open(handle, cudaGraphCondTypeWhile, 1); }

  // Work up to end_switch is divided into `cases` cases by next_case; case k, counted from 0, runs if the condition is
  // k.
  void begin_switch(int64_t handle, int64_t cases) {
#if CUDART_VERSION >= 12080
    open(handle, cudaGraphCondTypeSwitch, cases);
#else
    EE_CHECK(false, kOp, "expected CUDA 12.8 for begin_switch, got a build against ", CUDART_VERSION);
#endif
  }

  bool has_switch() const { return CUDART_VERSION >= 12080; }

  void next_case() {
    EE_CHECK(!open_.empty() && open_.back().entered < open_.back().bodies.size(), kOp,
             "expected next_case between the cases of begin_switch, got too many calls");
    pause();
    enter_body();
  }

  void close() {
    EE_CHECK(!open_.empty() && open_.back().entered == open_.back().bodies.size(), kOp,
             "expected the end of a node after its begin and all its cases");
    pause();
    const Node node = open_.back();
    open_.pop_back();
    capture(node.parent, &node.node);
  }

  // Sets `chosen` to the counter `turn` [1] int32, increments the counter, and sets `again` to whether turns are left.
  void take_turn(const at::Tensor& turn, int64_t chosen, int64_t again, int64_t turns) {
    EE_CHECK(allocates_, kOp, "expected take_turn to be called between begin and end");
    check_tensor(kOp, "turn", turn, at::kInt, {1});
    launch_take_turn(turn.mutable_data_ptr<int32_t>(), static_cast<unsigned long long>(chosen),
                     static_cast<unsigned long long>(again), static_cast<int32_t>(turns), stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void end() {
    EE_CHECK(allocates_ && open_.empty(), kOp, "expected end to be called after begin and the end of all nodes");
    pause();
    stop_allocating();
    C10_CUDA_CHECK(cudaGraphInstantiate(&runnable_, root_, 0));
    C10_CUDA_CHECK_WARN(cudaGraphUpload(runnable_, stream_));  // otherwise the first replay uploads it
  }

  void replay() {
    EE_CHECK(runnable_ != nullptr, kOp, "expected replay to be called after end");
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaGraphLaunch(runnable_, c10::cuda::getCurrentCUDAStream(device_)));
  }

  // Releases all resources and ends the capture, also if it failed.
  void abandon() {
    if (allocates_) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      C10_CUDA_CHECK_WARN(cudaStreamIsCapturing(stream_, &status));
      cudaGraph_t unfinished = nullptr;
      // fails by design if the capture was invalidated
      if (status != cudaStreamCaptureStatusNone) (void)cudaStreamEndCapture(stream_, &unfinished);
      (void)cudaGetLastError();
      stop_allocating();
    }
    if (runnable_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(runnable_));
    if (root_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphDestroy(root_));
    if (holds_pool_) c10::cuda::CUDACachingAllocator::releasePool(device_, pool_);
    runnable_ = nullptr;
    root_ = nullptr;
    holds_pool_ = false;
    open_.clear();
  }

 private:
  struct Node {
    cudaGraph_t parent;
    cudaGraphNode_t node;
    std::vector<cudaGraph_t> bodies;
    size_t entered;
  };

  void open(int64_t handle, cudaGraphConditionalNodeType type, int64_t bodies) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* before;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = static_cast<cudaGraphConditionalHandle>(handle);
    params.conditional.type = type;
    params.conditional.size = static_cast<unsigned>(bodies);
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, nullptr, &graph, &before, &edges, &count));
#else
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream_, &status, nullptr, &graph, &before, &edges, &count));
#endif
    EE_CHECK(status == cudaStreamCaptureStatusActive, kOp, "expected a node to begin between begin and end");
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaGraphAddNode(&node, graph, before, edges, count, &params));
#else
    C10_CUDA_CHECK(cudaGraphAddNode_v2(&node, graph, before, edges, count, &params));
#endif
    pause();
    const cudaGraph_t* created = params.conditional.phGraph_out;
    open_.push_back({graph, node, {created, created + bodies}, 0});
    enter_body();
  }

  void enter_body() { capture(open_.back().bodies[open_.back().entered++], nullptr); }

  void capture(cudaGraph_t into, const cudaGraphNode_t* behind) {
    C10_CUDA_CHECK(cudaStreamBeginCaptureToGraph(
        stream_, into, behind, nullptr, behind == nullptr ? 0 : 1, cudaStreamCaptureModeThreadLocal));
  }

  void pause() {
    cudaGraph_t same;
    C10_CUDA_CHECK(cudaStreamEndCapture(stream_, &same));
  }

  void stop_allocating() {
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_);
    allocates_ = false;
  }

  c10::DeviceIndex device_ = 0;
  c10::cuda::CUDAStream stream_ = c10::cuda::getDefaultCUDAStream();
  c10::cuda::MempoolId_t pool_{};
  cudaGraph_t root_ = nullptr;
  cudaGraphExec_t runnable_ = nullptr;
  std::vector<Node> open_;
  bool holds_pool_ = false;
  bool allocates_ = false;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(earlyexit_kernels, library) {
  library.class_<ConditionalGraph>("ConditionalGraph")
      .def(torch::init<>())
      .def("begin", &ConditionalGraph::begin)
      .def("handle", &ConditionalGraph::handle, "", {torch::arg("first") = 0})
      .def("begin_if", &ConditionalGraph::begin_if)
      .def("end_if", &ConditionalGraph::close)
      .def("begin_while", &ConditionalGraph::begin_while)
      .def("end_while", &ConditionalGraph::close)
      .def("has_switch", &ConditionalGraph::has_switch)
      .def("begin_switch", &ConditionalGraph::begin_switch)
      .def("next_case", &ConditionalGraph::next_case)
      .def("end_switch", &ConditionalGraph::close)
      .def("take_turn", &ConditionalGraph::take_turn)
      .def("end", &ConditionalGraph::end)
      .def("replay", &ConditionalGraph::replay)
      .def("abandon", &ConditionalGraph::abandon);
}

}  // namespace earlyexit
