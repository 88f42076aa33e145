package rest

import (
	"encoding/base64"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

// platform is what models run on.
const platform = "onnxruntime_onnx"

type tensorMetadata struct {
	Name     string  `json:"name"`
	Datatype string  `json:"datatype"`
	Shape    []int64 `json:"shape"`
}

func metadataOf(infos []tensor.Info) []tensorMetadata {
	list := make([]tensorMetadata, len(infos))
	for i, t := range infos {
		list[i] = tensorMetadata{t.Name, t.Type.String(), append([]int64{}, t.Shape...)}
	}
	return list
}

func (h *handler) metadata(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	m, err := h.server.Model(r.Context(), name, version)
	versions := make([]string, len(m.Versions))
	for i, v := range m.Versions {
		versions[i] = strconv.FormatInt(v, 10)
	}
	return h.writeJSON(w, struct {
		Name     string           `json:"name"`
		Versions []string         `json:"versions"`
		Platform string           `json:"platform"`
		Inputs   []tensorMetadata `json:"inputs"`
		Outputs  []tensorMetadata `json:"outputs"`
	}{m.Name, versions, platform, metadataOf(m.Inputs), metadataOf(m.Outputs)}, err)
}

func (h *handler) config(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	m, err := h.server.Model(r.Context(), name, version)
	if err != nil {
		return err
	}
	return h.write(w, protoJSON(m.Config, presentFields))
}

func (h *handler) statistics(w http.ResponseWriter, r *http.Request, name string, version int64) error {
	list, err := h.server.Statistics(r.Context(), name, version)
	if err != nil {
		return err
	}
	return h.write(w, protoJSON(&inference.ModelStatisticsResponse{ModelStats: list}, allFields))
}

// post reads the body of a POST, an object with members, or nothing. What
// member gets shares memory with the body, which is held while use runs.
func (h *handler) post(w http.ResponseWriter, r *http.Request, member func(p *parser, key []byte) error, use func() error) error {
	if r.Method != http.MethodPost {
		return notAllowed(w, r, http.MethodPost)
	}
	b := body{server: h.server}
	defer b.release()
	content, err := h.readBody(w, r, &b)
	if err != nil {
		return err
	}
	if err := decodeObject(content, member); err != nil {
		return err
	}
	return use()
}

// decodeObject reads an object, or nothing; member must read the value of the
// key that it gets.
func decodeObject(content []byte, member func(p *parser, key []byte) error) error {
	p := &parser{b: content}
	if p.next() == 0 && p.i == len(content) {
		return nil
	}
	if err := p.object(func(key []byte) error { return member(p, key) }); err != nil {
		return err
	}
	return p.end()
}

// repository answers what is under /v2/repository: index, and
// models/NAME/load and unload.
func (h *handler) repository(w http.ResponseWriter, r *http.Request, path string) error {
	parts := strings.Split(path, "/")
	last := parts[len(parts)-1]
	control := len(parts) >= 3 && parts[len(parts)-3] == "models" && (last == "load" || last == "unload")
	if repositories := len(parts) - 1; !control && (last != "index" || repositories > 1) || len(parts) > 4 {
		return notFound(r)
	} else if len(parts) == 4 || !control && repositories == 1 {
		return oip.Errorf(oip.Unsupported, "repository %q: a repository cannot be chosen by name", clip(parts[0]))
	}
	if last == "index" {
		return h.index(w, r)
	}
	model := parts[1]
	l := loadRequest{}
	return h.post(w, r, l.member, func() error {
		if last == "load" {
			return h.done(w, h.server.Load(r.Context(), model, l.parameters))
		}
		return h.done(w, h.server.Unload(r.Context(), model, l.parameters))
	})
}

func (h *handler) index(w http.ResponseWriter, r *http.Request) error {
	ready := false
	member := func(p *parser, key []byte) (err error) {
		if string(key) != "ready" {
			return p.skip()
		}
		ready, err = p.bool()
		return field(err, "ready")
	}
	return h.post(w, r, member, func() error {
		type model struct {
			Name    string `json:"name"`
			Version string `json:"version,omitempty"`
			State   string `json:"state,omitempty"`
			Reason  string `json:"reason,omitempty"`
		}
		index, err := h.server.Index(r.Context(), ready)
		list := make([]model, len(index))
		for i, m := range index {
			list[i] = model{m.GetName(), m.GetVersion(), m.GetState(), m.GetReason()}
		}
		return h.writeJSON(w, list, err)
	})
}

// loadRequest is the body of a load or unload.
type loadRequest struct {
	parameters map[string]*inference.ModelRepositoryParameter
}

func (l *loadRequest) member(p *parser, key []byte) error {
	if string(key) != "parameters" {
		return p.skip()
	}
	l.parameters = map[string]*inference.ModelRepositoryParameter{}
	return p.object(func(key []byte) error {
		name := string(key)
		value, err := loadParameter(p, name)
		l.parameters[name] = value
		return field(err, "parameters."+clip(name))
	})
}

func loadParameter(p *parser, name string) (*inference.ModelRepositoryParameter, error) {
	switch p.next() {
	case '"':
		s, err := p.str()
		if err != nil || !strings.HasPrefix(name, "file:") {
			return &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_StringParam{StringParam: string(s)}}, err
		}
		content, err := base64.StdEncoding.AppendDecode(nil, s)
		if err != nil {
			err = oip.Errorf(oip.InvalidArgument, "is not base64: %w", err)
		}
		return &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_BytesParam{BytesParam: content}}, err
	case 't', 'f':
		v, err := p.bool()
		return &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_BoolParam{BoolParam: v}}, err
	}
	// No parameter is a number, an object, an array or null.
	return &inference.ModelRepositoryParameter{}, p.skip()
}

// memoryPath takes [region/NAME/]ACTION apart.
func memoryPath(path string) (name, action string, ok bool) {
	if region, found := strings.CutPrefix(path, "region/"); found {
		name, action, _ = strings.Cut(region, "/")
		ok = name != ""
	} else {
		action, ok = path, path != "register"
	}
	return name, action, ok && (action == "status" || action == "register" || action == "unregister")
}

// memory answers what is under /v2/systemsharedmemory.
func (h *handler) memory(w http.ResponseWriter, r *http.Request, path string) error {
	name, action, ok := memoryPath(path)
	switch {
	case !ok:
		return notFound(r)
	case action == "status":
		return get(w, r, func() error {
			type region struct {
				Name     string `json:"name"`
				Key      string `json:"key"`
				Offset   uint64 `json:"offset"`
				ByteSize uint64 `json:"byte_size"`
			}
			regions, err := h.server.Memory(name)
			list := make([]region, 0, len(regions))
			for _, n := range slices.Sorted(maps.Keys(regions)) {
				s := regions[n]
				list = append(list, region{s.GetName(), s.GetKey(), s.GetOffset(), s.GetByteSize()})
			}
			return h.writeJSON(w, list, err)
		})
	case action == "register":
		m := memoryRequest{}
		return h.post(w, r, m.member, func() error {
			return h.done(w, m.register(h.server, name))
		})
	}
	return h.post(w, r, skip, func() error { return h.done(w, h.server.UnregisterMemory(name)) })
}

func skip(p *parser, _ []byte) error { return p.skip() }

// memoryRequest is the body of a registration.
type memoryRequest struct {
	key    string
	offset uint64
	size   *uint64
}

func (m *memoryRequest) member(p *parser, key []byte) (err error) {
	switch string(key) {
	case "key":
		m.key, err = p.name()
	case "offset":
		m.offset, err = p.unsigned(math.MaxUint64)
	case "byte_size":
		var n uint64
		n, err = p.unsigned(math.MaxUint64)
		m.size = &n
	default:
		return p.skip()
	}
	return field(err, key)
}

// register makes the region known.
func (m *memoryRequest) register(server *oip.Server, name string) error {
	if m.key == "" {
		return oip.Errorf(oip.InvalidArgument, "shared memory region %q: key is missing", clip(name))
	}
	if m.size == nil {
		return oip.Errorf(oip.InvalidArgument, "shared memory region %q: byte_size is missing", clip(name))
	}
	return server.RegisterMemory(name, m.key, m.offset, *m.size)
}

// cudaMemory answers what is under /v2/cudasharedmemory, where nothing can be
// registered. Forgetting succeeds, as clients forget all regions at first.
func (h *handler) cudaMemory(w http.ResponseWriter, r *http.Request, path string) error {
	name, action, ok := memoryPath(path)
	switch {
	case !ok:
		return notFound(r)
	case action == "status":
		return get(w, r, func() error {
			if name != "" {
				return oip.Errorf(oip.NotFound, "there is no CUDA shared memory region %q", clip(name))
			}
			return h.writeJSON(w, []struct{}{}, nil)
		})
	case action == "register":
		return h.post(w, r, skip, func() error {
			return oip.Errorf(oip.Unsupported, "shared memory region %q: CUDA shared memory is not supported", clip(name))
		})
	}
	return h.post(w, r, skip, func() error { return h.done(w, nil) })
}

// trace answers with the trace settings of a model, or of all models.
func (h *handler) trace(w http.ResponseWriter, r *http.Request, model string) error {
	change := traceRequest{}
	show := func() error {
		settings, err := h.server.TraceSettings(r.Context(), model, change)
		shown := map[string]any{}
		for name, values := range settings {
			if shown[name] = values; name != "trace_level" && len(values) == 1 {
				shown[name] = values[0]
			}
		}
		return h.writeJSON(w, shown, err)
	}
	if r.Method == http.MethodGet {
		return show()
	}
	if r.Method != http.MethodPost {
		return notAllowed(w, r, "GET, POST")
	}
	return h.post(w, r, change.member, show)
}

// traceRequest is the body of a change of trace settings.
type traceRequest map[string][]string

func (t traceRequest) member(p *parser, key []byte) error {
	var values []string
	str := func(int) error {
		v, err := p.name()
		values = append(values, v)
		return err
	}
	var err error
	switch p.next() {
	case 'n':
		err = p.skip()
	case '[':
		err = p.array(str)
	default:
		err = str(0)
	}
	t[string(key)] = values
	return field(err, clip(string(key)))
}

// logging answers with the logging settings.
func (h *handler) logging(w http.ResponseWriter, r *http.Request) error {
	change := logRequest{}
	show := func() error {
		settings, err := h.server.LogSettings(r.Context(), change)
		return h.writeJSON(w, settings, err)
	}
	if r.Method == http.MethodGet {
		return show()
	}
	if r.Method != http.MethodPost {
		return notAllowed(w, r, "GET, POST")
	}
	return h.post(w, r, change.member, show)
}

// logRequest is the body of a change of logging settings.
type logRequest map[string]any

func (l logRequest) member(p *parser, key []byte) (err error) {
	var value any
	switch p.next() {
	case 'n':
		return p.skip() // changes nothing
	case 't', 'f':
		value, err = p.bool()
	case '"':
		value, err = p.name()
	default:
		var n uint64
		n, err = p.unsigned(math.MaxUint32)
		value = uint32(n)
	}
	l[string(key)] = value
	return field(err, clip(string(key)))
}
