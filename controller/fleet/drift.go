package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The limits of drift.
const (
	// DriftGrace is the time that a device has for a new document before it
	// is held against what it reports.
	DriftGrace = 30 * time.Second
	// MaxDrifts bounds what is kept of one device.
	MaxDrifts    = 100
	maxDriftText = 300 // bytes of one field
)

// Drifts says what of a device is other than its desired document has it, by
// kind and subject: versions that it lacks, has with other files or does not
// serve; versions that it serves and should not; routes that are not ready; the
// agent program; and what the device itself found (files, settings, its
// runtime). observed is since when it has its document, zero: it has not taken
// it in; before DriftGrace is over since then nothing is held against it but
// what it found itself. A device that is on its way, with bytes still to come,
// drifts all the same: what it has is not what it should have.
//
// Since is taken from before, the list as it was last, for what is in it.
func Drifts(info *dunlinv1.DeviceInfo, desired *dunlinv1.DesiredDocument, reported *dunlinv1.Reported, observed, now time.Time, before []*dunlinv1.Drift) []*dunlinv1.Drift {
	var found []*dunlinv1.Drift
	add := func(kind, subject, want, have, repair string) {
		found = append(found, &dunlinv1.Drift{Kind: kind, Subject: subject, Want: want, Have: have, Repair: repair})
	}
	for _, d := range reported.GetDrifts() {
		since := d.GetSince()
		if since.CheckValid() != nil || since.AsTime().After(now) {
			since = nil
		}
		found = append(found, &dunlinv1.Drift{Kind: d.GetKind(), Subject: d.GetSubject(), Want: d.GetWant(), Have: d.GetHave(), Repair: d.GetRepair(), Since: since})
	}
	if reported != nil && !observed.IsZero() && now.Sub(observed) > DriftGrace {
		driftVersions(desired, reported, add)
		driftRoutes(desired, reported, add)
		driftAgent(info, desired.GetAgent(), reported.GetAgent(), add)
	}
	was := map[[2]string]*timestamppb.Timestamp{}
	for _, d := range before {
		was[[2]string{d.GetKind(), d.GetSubject()}] = d.GetSince()
	}
	for _, d := range found {
		d.Kind, d.Subject, d.Want, d.Have, d.Repair = driftText(d.Kind), driftText(d.Subject), driftText(d.Want), driftText(d.Have), driftText(d.Repair)
		switch since := was[[2]string{d.Kind, d.Subject}]; {
		case since != nil:
			d.Since = since
		case d.Since == nil:
			d.Since = timestamppb.New(now)
		}
	}
	slices.SortStableFunc(found, func(a, b *dunlinv1.Drift) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Subject, b.Subject))
	})
	// What the device found stands before what follows from its report.
	found = slices.CompactFunc(found, func(a, b *dunlinv1.Drift) bool { return a.Kind == b.Kind && a.Subject == b.Subject })
	return found[:min(len(found), MaxDrifts)]
}

// driftText shortens a text from a device.
func driftText(s string) string { return strings.ToValidUTF8(clipTo(s, maxDriftText), "") }

type addDrift func(kind, subject, want, have, repair string)

func driftVersions(desired *dunlinv1.DesiredDocument, reported *dunlinv1.Reported, add addDrift) {
	byVersion := map[versionKey]*dunlinv1.VersionStatus{}
	for _, v := range reported.GetVersions() {
		byVersion[versionKey{v.GetModel(), v.GetVersion()}] = v
	}
	wanted := map[versionKey]bool{}
	for _, w := range desired.GetVersions() {
		key := versionKey{w.GetModel(), w.GetVersion()}
		wanted[key] = true
		subject, want := fmt.Sprintf("%s:%d", w.GetModel(), w.GetVersion()), "serving "+w.GetDigest()
		have := byVersion[key]
		switch state := have.GetState(); {
		case have == nil || state == dunlinv1.VersionState_VERSION_STATE_ABSENT:
			if total := have.GetBytesTotal(); total > 0 {
				add("version", subject, want, fmt.Sprintf("absent, %s of %s there", size(have.GetBytesPresent()), size(total)), "is fetched")
			} else {
				add("version", subject, want, "absent", "is fetched")
			}
		case have.GetDigest() != "" && have.GetDigest() != w.GetDigest():
			add("version", subject, want, "files of "+have.GetDigest(), "is fetched")
		case state == dunlinv1.VersionState_VERSION_STATE_QUARANTINED:
			add("version", subject, want, "quarantined: "+have.GetReason(), "")
		case !have.GetServing():
			text := strings.ToLower(strings.TrimPrefix(state.String(), "VERSION_STATE_"))
			if have.GetReason() != "" {
				text += ": " + have.GetReason()
			}
			add("version", subject, want, text, "is loaded")
		}
	}
	for _, v := range reported.GetVersions() {
		if v.GetServing() && !wanted[versionKey{v.GetModel(), v.GetVersion()}] {
			add("version", fmt.Sprintf("%s:%d", v.GetModel(), v.GetVersion()), "absent", "serving", "is unloaded")
		}
	}
}

func driftRoutes(desired *dunlinv1.DesiredDocument, reported *dunlinv1.Reported, add addDrift) {
	byName := map[string]*dunlinv1.RouteStatus{}
	for _, r := range reported.GetRoutes() {
		byName[r.GetName()] = r
	}
	for _, w := range desired.GetRoutes() {
		switch have := byName[w.GetName()]; {
		case have == nil:
			add("route", w.GetName(), "ready", "absent", "")
		case !have.GetReady():
			add("route", w.GetName(), "ready", "not ready: "+have.GetReason(), "")
		}
	}
}

// driftAgent holds the agent program against the release that the device
// should run. Where no deployment says one, any is right.
func driftAgent(info *dunlinv1.DeviceInfo, want *dunlinv1.DesiredAgent, have *dunlinv1.AgentStatus, add addDrift) {
	if want.GetAgentVersion() == "" {
		return
	}
	runs := cmp.Or(have.GetAgentVersion(), info.GetAgentVersion())
	if runs == want.GetAgentVersion() {
		return
	}
	text, repair := runs, "is updated"
	switch have.GetState() {
	case dunlinv1.AgentStatus_STATE_REVERTED:
		text, repair = runs+", went back: "+have.GetReason(), ""
	case dunlinv1.AgentStatus_STATE_REFUSED:
		text, repair = runs+", refused: "+have.GetReason(), ""
	}
	add("agent", AgentModel, want.GetAgentVersion(), text, repair)
}
