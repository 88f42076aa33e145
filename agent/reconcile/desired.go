package reconcile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/policy"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxRefusal bounds the reason of a refusal that is reported, in bytes: the log
// and the event have all of it.
const maxRefusal = 1024

// shorten cuts a text to so many bytes.
func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most-3], "") + "..."
}

// accept stores a desired document and works towards it from then on.
func (r *Reconciler) accept(ctx context.Context, d *dunlinv1.Desired) {
	have := r.have.Load()
	sum := sha256.Sum256(d.Document)
	log := r.cfg.Log.With("generation", d.Generation.GetNumber(), "incarnation", d.Generation.GetIncarnation())
	if have.GetIncarnation() == d.Generation.GetIncarnation() && have.GetNumber() >= d.Generation.GetNumber() {
		if have.GetNumber() == d.Generation.GetNumber() {
			signal(r.changed) // the controller has not heard that it is observed
		}
		return
	}
	doc, err := parseDesired(d, sum)
	if err != nil {
		if !proto.Equal(r.refusal.GetGeneration(), d.Generation) {
			r.refusal = &dunlinv1.DesiredRefusal{Generation: d.Generation, Reason: shorten(err.Error(), maxRefusal), Since: timestamppb.Now()}
		}
		if r.refused != sum { // it is sent again and again
			r.refused = sum
			log.Error("desired document refused", "error", err)
			r.event("desired.refused", dunlinv1.Severity_SEVERITY_ERROR, key{}, fmt.Sprintf("generation %d: %v", d.Generation.GetNumber(), err))
		}
		return
	}
	err = r.cfg.State.SetDesired(ctx, state.Desired{
		Incarnation: d.Generation.Incarnation, Number: d.Generation.Number, SHA256: sum[:], Document: d.Document,
	})
	if err != nil {
		log.Error("desired document not accepted", "error", err)
		return
	}
	r.refused, r.refusal = [sha256.Size]byte{}, nil
	r.have.Store(d.Generation)
	r.core.setDesired(doc, time.Now())
	r.wantAgent(doc)
	log.Info("desired document accepted", "versions", len(doc.Versions), "routes", len(doc.Routes))
}

// parseDesired decodes and checks a desired document.
func parseDesired(d *dunlinv1.Desired, sum [sha256.Size]byte) (*dunlinv1.DesiredDocument, error) {
	if !bytes.Equal(d.Sha256, sum[:]) {
		return nil, fmt.Errorf("has SHA-256 %x, want %x", sum, d.Sha256)
	}
	doc := new(dunlinv1.DesiredDocument)
	if err := proto.Unmarshal(d.Document, doc); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for i, v := range doc.Versions {
		if err := models.CheckName(v.Model); err != nil {
			return nil, fmt.Errorf("versions[%d].model: %w", i, err)
		}
		if v.Version < 1 {
			return nil, fmt.Errorf("versions[%d].version: %d is below 1", i, v.Version)
		}
		if n := len(v.Signatures); n > signing.MaxSignatures {
			return nil, fmt.Errorf("versions[%d].signatures: there are %d, the limit is %d", i, n, signing.MaxSignatures)
		}
		if err := checkDelivery(v.Delivery); err != nil {
			return nil, fmt.Errorf("versions[%d].%w", i, err)
		}
		for _, text := range append([]string{v.Digest}, v.Signatures...) {
			if dg := digest.Digest(text); dg.Validate() != nil || dg.Algorithm() != digest.SHA256 {
				return nil, fmt.Errorf("versions[%d]: digest %q is not sha256: and 64 hexadecimal digits", i, text)
			}
		}
		if seen[v.Model] {
			return nil, fmt.Errorf("versions[%d]: a second version of model %s", i, v.Model)
		}
		seen[v.Model] = true
	}
	if a := doc.Agent; a != nil {
		if dg := digest.Digest(a.Digest); dg.Validate() != nil || dg.Algorithm() != digest.SHA256 {
			return nil, fmt.Errorf("agent: digest %q is not sha256: and 64 hexadecimal digits", a.Digest)
		}
		if a.Version < 1 {
			return nil, fmt.Errorf("agent.version: %d is below 1", a.Version)
		}
		if _, err := models.ParseRelease(a.AgentVersion); err != nil {
			return nil, fmt.Errorf("agent.agent_version: %w", err)
		}
	}
	clear(seen)
	for i, route := range doc.Routes {
		if _, err := policy.Compile(route); err != nil {
			return nil, fmt.Errorf("routes[%d]: %w", i, err)
		}
		if seen[route.Name] {
			return nil, fmt.Errorf("routes[%d]: a second route %s", i, route.Name)
		}
		seen[route.Name] = true
	}
	return doc, nil
}
