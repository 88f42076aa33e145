package access

// Need is what somebody must have to be answered.
type Need int

// The needs.
const (
	Nothing  Need = iota // everybody is answered; by gRPC who shows a key must show a right one
	Known                // a key or certificate, for whatever models; lists leave out others
	OfModel              // one that is for the model
	OfModels             // one that is for all models
)

// Route is one thing that an agent with keys can be asked for.
type Route struct {
	Method, Path string // of REST, with {model} for its name; "": it is gRPC
	Call         string // of gRPC
	Need         Need
}

const (
	protocol = "/inference.GRPCInferenceService/"
	healthy  = "/grpc.health.v1.Health/"
)

// Routes are all that an agent answers, with what each needs. It is a
// statement: what holds it is tried against running agents.
var Routes = []Route{
	{Method: "GET", Path: "/healthz"},
	{Method: "GET", Path: "/v2/health/live"},
	{Method: "GET", Path: "/v2/health/ready"},
	{Method: "GET", Path: "/metrics", Need: OfModels},
	{Method: "GET", Path: "/v2", Need: Known},
	{Method: "GET", Path: "/v2/models/stats", Need: Known},
	{Method: "GET", Path: "/v2/models/{model}", Need: OfModel},
	{Method: "GET", Path: "/v2/models/{model}/versions/1", Need: OfModel},
	{Method: "GET", Path: "/v2/models/{model}/ready", Need: OfModel},
	{Method: "GET", Path: "/v2/models/{model}/config", Need: OfModel},
	{Method: "GET", Path: "/v2/models/{model}/stats", Need: OfModel},
	{Method: "POST", Path: "/v2/models/{model}/infer", Need: OfModel},
	{Method: "GET", Path: "/v2/models/{model}/trace/setting", Need: OfModel},
	{Method: "POST", Path: "/v2/models/{model}/trace/setting", Need: OfModel},
	{Method: "GET", Path: "/v2/trace/setting", Need: Known},
	{Method: "POST", Path: "/v2/trace/setting", Need: OfModels},
	{Method: "GET", Path: "/v2/logging", Need: Known},
	{Method: "POST", Path: "/v2/logging", Need: OfModels},
	{Method: "POST", Path: "/v2/repository/index", Need: Known},
	{Method: "POST", Path: "/v2/repository/models/{model}/load", Need: OfModel},
	{Method: "POST", Path: "/v2/repository/models/{model}/unload", Need: OfModel},
	{Method: "GET", Path: "/v2/systemsharedmemory/status", Need: Known},
	{Method: "POST", Path: "/v2/systemsharedmemory/region/r/register", Need: Known},
	{Method: "POST", Path: "/v2/systemsharedmemory/region/r/unregister", Need: Known},
	{Method: "GET", Path: "/v2/cudasharedmemory/status", Need: Known},
	{Method: "POST", Path: "/v2/cudasharedmemory/region/r/register", Need: Known},
	{Method: "POST", Path: "/v2/cudasharedmemory/region/r/unregister", Need: Known},

	{Call: protocol + "ServerLive"},
	{Call: protocol + "ServerReady"},
	{Call: healthy + "Check"},
	{Call: healthy + "Watch", Need: Known},
	{Call: healthy + "List", Need: Known},
	{Call: protocol + "ServerMetadata", Need: Known},
	{Call: protocol + "ModelReady", Need: OfModel},
	{Call: protocol + "ModelMetadata", Need: OfModel},
	{Call: protocol + "ModelInfer", Need: OfModel},
	{Call: protocol + "ModelStreamInfer", Need: OfModel},
	{Call: protocol + "ModelConfig", Need: OfModel},
	{Call: protocol + "ModelStatistics", Need: OfModel},
	{Call: protocol + "RepositoryIndex", Need: Known},
	{Call: protocol + "RepositoryModelLoad", Need: OfModel},
	{Call: protocol + "RepositoryModelUnload", Need: OfModel},
	{Call: protocol + "SystemSharedMemoryStatus", Need: Known},
	{Call: protocol + "SystemSharedMemoryRegister", Need: Known},
	{Call: protocol + "SystemSharedMemoryUnregister", Need: Known},
	{Call: protocol + "CudaSharedMemoryStatus", Need: Known},
	{Call: protocol + "CudaSharedMemoryRegister", Need: Known},
	{Call: protocol + "CudaSharedMemoryUnregister", Need: Known},
	{Call: protocol + "TraceSetting", Need: OfModel},
	{Call: protocol + "LogSettings", Need: Known},
}
