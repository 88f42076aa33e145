package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/state"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// wire gives the version's state as it is reported.
func (v *version) wire() dunlinv1.VersionState {
	switch {
	case v.quarantine != "":
		return dunlinv1.VersionState_VERSION_STATE_QUARANTINED
	case v.busy == unloading:
		return dunlinv1.VersionState_VERSION_STATE_DRAINING
	case v.stage == resident:
		return dunlinv1.VersionState_VERSION_STATE_RESIDENT
	case v.stage == stored:
		return dunlinv1.VersionState_VERSION_STATE_STORED
	default:
		return dunlinv1.VersionState_VERSION_STATE_ABSENT
	}
}

// reason says why the version is not further.
func (v *version) reason() string {
	if v.failure == "" {
		return v.quarantine
	}
	return fmt.Sprintf("try %d failed: %s; the next is at %s", v.failures, v.failure, v.notBefore.UTC().Format(time.RFC3339))
}

// publish makes the report anew and says so where it changed.
func (r *Reconciler) publish() {
	rep := &dunlinv1.Reported{Observed: r.have.Load()}
	for _, v := range r.core.sorted() {
		s := &dunlinv1.VersionStatus{
			Model: v.id.Model, Version: v.id.Version, Digest: v.digest.String(), State: v.wire(), Reason: v.reason(),
			Serving: r.core.serving[v.id.Model] == v, BytesTotal: v.size, Since: timestamppb.New(v.since), Deployment: v.deployment,
			Reverted: v.reverted,
		}
		if d := r.downloads[v.key]; d != nil {
			s.BytesPresent, s.BytesTotal = uint64(d.present.Load()), uint64(d.total.Load())
			v.fetched = uint64(d.fetched.Load())
		}
		s.BytesFetched, s.WaitsFor = v.fetched, v.waitsFor
		if v.stage != absent {
			s.BytesPresent = s.BytesTotal
		}
		rep.Versions = append(rep.Versions, s)
	}
	for _, name := range sortedKeys(r.core.routes) {
		s := &dunlinv1.RouteStatus{Name: name, Reason: r.core.missing(r.core.routes[name])}
		s.Ready = s.Reason == ""
		rep.Routes = append(rep.Routes, s)
	}
	rep.Drifts, rep.Refused = r.drifts(), r.refusal
	r.list()
	if old := r.report.Load(); old == nil || !proto.Equal(old, rep) {
		r.report.Store(rep)
		signal(r.changed)
	}
}

// list says which bundles inspect looks at.
func (r *Reconciler) list() {
	var all []digest.Digest
	for _, v := range r.core.sorted() {
		whole := v.stage != absent && v.damage == nil && v.busy != fetching && v.busy != removing && v.busy != repairing
		if i := slices.Index(all, v.digest); whole && i < 0 && !r.core.bundleBusy(v) {
			all = append(all, v.digest)
		}
	}
	if old := r.installed.Load(); old == nil || !slices.Equal(*old, all) {
		r.installed.Store(&all)
	}
}

// save brings the state file up to date with what the core knows. Where two
// versions have the same name, the one that served is kept.
func (r *Reconciler) save(ctx context.Context) {
	rows := map[key]state.Version{}
	byID := map[string]key{}
	for _, v := range r.core.sorted() {
		row := state.Version{
			Model: v.id.Model, Version: v.id.Version, Digest: v.digest.String(), State: v.wire(), Reason: v.quarantine,
			Since: v.since.UTC(), LastGood: v.good, Admitted: v.admitted, Signatures: texts(v.signatures), Trials: v.trials, Resumes: v.resumes, Reverted: v.reverted,
		}
		if v.busy == unloading {
			row.State = dunlinv1.VersionState_VERSION_STATE_RESIDENT
		}
		if other, twice := byID[v.id.String()]; twice {
			if rows[other].LastGood {
				continue
			}
			delete(rows, other)
		}
		byID[v.id.String()] = v.key
		rows[v.key] = row
	}
	r.unsaved = false
	// One that becomes the last good one takes that from the others in the
	// same transaction: they come after it.
	keys := slices.SortedFunc(maps.Keys(rows), func(a, b key) int {
		return cmp.Or(cmp.Compare(rank(rows[a]), rank(rows[b])), compareKeys(a, b))
	})
	for _, k := range keys {
		row := rows[k]
		if old, ok := r.saved[k]; ok && same(old, row) {
			continue
		}
		if err := r.cfg.State.PutVersion(ctx, row); err != nil {
			r.unsaved = true
			if ctx.Err() == nil {
				r.cfg.Log.Error("state not stored", "error", err)
			}
			return
		}
		for other := range r.saved { // what the row took the place of
			if other.id == k.id {
				delete(r.saved, other)
			}
		}
		r.saved[k] = row
	}
}

func rank(v state.Version) int {
	if v.LastGood {
		return 0
	}
	return 1
}

func same(a, b state.Version) bool {
	return a.Digest == b.Digest && a.State == b.State && a.Reason == b.Reason && a.LastGood == b.LastGood && a.Admitted == b.Admitted && a.Trials == b.Trials && a.Resumes == b.Resumes && a.Reverted == b.Reverted && a.Since.Equal(b.Since) &&
		slices.Equal(a.Signatures, b.Signatures)
}

func texts(digests []digest.Digest) []string {
	var all []string
	for _, d := range digests {
		all = append(all, d.String())
	}
	return all
}

// forget deletes a version that was removed.
func (r *Reconciler) forget(ctx context.Context, k key) {
	if _, ok := r.saved[k]; !ok {
		return
	}
	delete(r.saved, k)
	if err := r.cfg.State.DeleteVersion(ctx, k.id.Model, k.id.Version); err != nil && ctx.Err() == nil {
		// A row without a bundle does no harm: the next start finds the version absent.
		r.cfg.Log.Error("state not stored", "error", err)
	}
}
