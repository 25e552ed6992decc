// A CUDA graph with IF nodes, whose conditions earlier kernels set; captured in segments on one stream.
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

  // Creates the condition of a node, which is 0 at the start of each replay, until a kernel sets it.
  int64_t handle() {
    EE_CHECK(allocates_, kOp, "expected handle to be called between begin and end");
    cudaGraphConditionalHandle created;
    C10_CUDA_CHECK(cudaGraphConditionalHandleCreate(&created, root_, 0, cudaGraphCondAssignDefault));
    return static_cast<int64_t>(created);
  }

  // Work up to end_if runs if the condition is not 0.
  void begin_if(int64_t handle) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* before;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = static_cast<cudaGraphConditionalHandle>(handle);
    params.conditional.type = cudaGraphCondTypeIf;
    params.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, nullptr, &graph, &before, &edges, &count));
#else
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream_, &status, nullptr, &graph, &before, &edges, &count));
#endif
    EE_CHECK(status == cudaStreamCaptureStatusActive, kOp, "expected begin_if between begin and end");
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaGraphAddNode(&node, graph, before, edges, count, &params));
#else
    C10_CUDA_CHECK(cudaGraphAddNode_v2(&node, graph, before, edges, count, &params));
#endif
    pause();
    open_.push_back({graph, node});
    capture(params.conditional.phGraph_out[0], nullptr);
  }

  void end_if() {
    EE_CHECK(!open_.empty(), kOp, "expected end_if after begin_if");
    pause();
    const Node node = open_.back();
    open_.pop_back();
    capture(node.parent, &node.node);
  }

  void end() {
    EE_CHECK(allocates_ && open_.empty(), kOp, "expected end to be called after begin and end_if of all nodes");
    pause();
    stop_allocating();
    cudaGraphInstantiateParams how{};
    if (const cudaError_t error = cudaGraphInstantiateWithParams(&runnable_, root_, &how); error != cudaSuccess) {
      runnable_ = nullptr;
      (void)cudaGetLastError();  // it stays otherwise, and later calls would report it
      TORCH_CHECK_WITH(OutOfMemoryError, error != cudaErrorMemoryAllocation, kOp, ": ", cudaGetErrorString(error));
      TORCH_CHECK(false, kOp, ": cudaGraphInstantiateWithParams failed with result ", how.result_out, ": ",
                  cudaGetErrorString(error));
    }
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
  };

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
      .def("handle", &ConditionalGraph::handle)
      .def("begin_if", &ConditionalGraph::begin_if)
      .def("end_if", &ConditionalGraph::end_if)
      .def("end", &ConditionalGraph::end)
      .def("replay", &ConditionalGraph::replay)
      .def("abandon", &ConditionalGraph::abandon);
}

}  // namespace earlyexit
