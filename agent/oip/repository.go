package oip

import (
	"context"
	"encoding/json"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/proto/inference"
)

const (
	stateReady = "READY" // of a model in the index that can answer
	filePrefix = "file:" // of the load parameters that replace files
	maxFiles   = 1024    // that a load may replace
)

var errNoRepository = Errorf(Unsupported, "this server has no model repository that callers can control")

// Index lists the models of the repository that the caller may know of; ready leaves out those that
// cannot answer.
func (s *Server) Index(ctx context.Context, ready bool) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	if s.cfg.Repository == nil {
		return nil, errNoRepository
	}
	list, err := s.cfg.Repository.Index(ctx)
	if s.cfg.Access != nil {
		list = slices.DeleteFunc(list, func(m *inference.RepositoryIndexResponse_ModelIndex) bool {
			return !s.cfg.Access.Sees(ctx, m.GetName())
		})
	}
	if ready {
		list = slices.DeleteFunc(list, func(m *inference.RepositoryIndexResponse_ModelIndex) bool { return m.GetState() != stateReady })
	}
	return list, err
}

// Load loads a model of the repository. The parameters are those of the
// protocol: "config", JSON, and "file:PATH", the content of a file, which
// needs config beside it.
func (s *Server) Load(ctx context.Context, model string, parameters map[string]*inference.ModelRepositoryParameter) error {
	if s.cfg.Repository == nil {
		return errNoRepository
	}
	if err := checkModelName(model); err != nil {
		return err
	}
	if err := s.permit(ctx, model); err != nil {
		return err
	}
	o, err := override(parameters)
	if err != nil {
		return prefix(err, "load model %q", model)
	}
	return s.cfg.Repository.Load(ctx, model, o)
}

// Unload unloads a model of the repository. The parameter
// "unload_dependents" changes nothing, as no model depends on another.
func (s *Server) Unload(ctx context.Context, model string, parameters map[string]*inference.ModelRepositoryParameter) error {
	if s.cfg.Repository == nil {
		return errNoRepository
	}
	if err := checkModelName(model); err != nil {
		return err
	}
	if err := s.permit(ctx, model); err != nil {
		return err
	}
	if p := parameters["unload_dependents"]; p != nil {
		if _, ok := p.GetParameterChoice().(*inference.ModelRepositoryParameter_BoolParam); !ok {
			return Errorf(InvalidArgument, "unload model %q: parameter unload_dependents is not a boolean", model)
		}
	}
	return s.cfg.Repository.Unload(ctx, model)
}

// checkModelName refuses what cannot be the name of a folder.
func checkModelName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > MaxName || strings.ContainsAny(name, "/\\\x00") {
		return Errorf(InvalidArgument, "%q is not the name of a model", clip(name))
	}
	return nil
}

// override reads load parameters.
func override(parameters map[string]*inference.ModelRepositoryParameter) (Override, error) {
	var o Override
	for name, p := range parameters {
		if file, ok := strings.CutPrefix(name, filePrefix); ok {
			content, ok := p.GetParameterChoice().(*inference.ModelRepositoryParameter_BytesParam)
			switch {
			case !ok:
				return o, Errorf(InvalidArgument, "parameter %q is not bytes", clip(name))
			case len(name) > MaxName || strings.ContainsAny(file, "\\\x00") || !filepath.IsLocal(file) || path.Clean(file) == ".":
				return o, Errorf(InvalidArgument, "parameter %q does not name a file within the model's folder", clip(name))
			case len(o.Files) >= maxFiles:
				return o, Errorf(InvalidArgument, "more than %d files", maxFiles)
			}
			file = path.Clean(file)
			if _, ok := o.Files[file]; ok {
				return o, Errorf(InvalidArgument, "parameter %q names a file that another one names", clip(name))
			}
			if o.Files == nil {
				o.Files = map[string][]byte{}
			}
			o.Files[file] = content.BytesParam
			continue
		}
		if name != "config" {
			return o, Errorf(InvalidArgument, "unrecognized parameter %q", clip(name))
		}
		config, ok := p.GetParameterChoice().(*inference.ModelRepositoryParameter_StringParam)
		if !ok || !json.Valid([]byte(config.StringParam)) {
			return o, Errorf(InvalidArgument, "parameter config is not a string of JSON")
		}
		o.Config = []byte(config.StringParam)
	}
	if o.Files != nil && o.Config == nil {
		return o, Errorf(InvalidArgument, "parameter config must come with files")
	}
	return o, nil
}
