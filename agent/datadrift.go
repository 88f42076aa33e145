package agent

import (
	"errors"
	"io/fs"

	"github.com/dunlin/dunlin/agent/datadrift"
	"github.com/dunlin/dunlin/agent/engine"
	"github.com/dunlin/dunlin/models"
)

// watchData gives what watches the requests and answers of a version. A
// reference in its folder that has rows enough, and fits it, says what these are
// like; without one, its first day does.
func (h *host) watchData(spec engine.Spec, info *engine.Info) *datadrift.Watch {
	w := datadrift.New(info.Inputs, info.Outputs, info.Options.MaxBatchSize > 0)
	ref, err := models.ReadReference(spec.Dir)
	if err == nil {
		err = ref.Fits(info.Inputs, info.Outputs)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		h.serving.Log.Warn("data is compared with that of the first day: the reference cannot be used", "model", spec.ID.Model, "version", spec.ID.Version, "error", err)
	case w.Refer(ref.Inputs, ref.Outputs):
		h.serving.Log.Info("data is compared with the reference that came with the version", "model", spec.ID.Model, "version", spec.ID.Version)
	}
	return w
}
