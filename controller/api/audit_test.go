package api

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/internal/audit"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// audit gives the newest records, oldest first.
func (w *world) audit(t *testing.T, limit uint32) []*v1.AuditRecord {
	t.Helper()
	return call(t, v1connect.NewAuditServiceClient(w.client, w.url, as(admin)).ListAudit, &v1.ListAuditRequest{Limit: limit, Newest: true}).Records
}

// flush has what was refused written now.
func (w *world) flush(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, w.store.RunRefusals(ctx, slog.New(slog.DiscardHandler)))
}

func TestListAudit(t *testing.T) {
	w := start(t)
	w.push(t, "digits", 5)
	c := v1connect.NewAuditServiceClient(w.client, w.url, as(admin))
	all := call(t, c.ListAudit, &v1.ListAuditRequest{})
	n := uint64(len(all.Records))
	if n < 5 || all.AnchorNumber != 0 || len(all.Anchor) != 32 || all.HeadNumber != n || !slices.Equal(all.Head, all.Records[n-1].Hash) {
		t.Fatalf("got %v", all)
	}
	head, err := audit.Verify(audit.Point{Number: all.AnchorNumber, Hash: [32]byte(all.Anchor)}, func(yield func(*v1.AuditRecord, error) bool) {
		for _, r := range all.Records {
			if !yield(r, nil) {
				return
			}
		}
	})
	if err != nil || head.Number != n {
		t.Errorf("got %v, %v", head, err)
	}
	numbers := func(q *v1.ListAuditRequest) (numbers []uint64) {
		t.Helper()
		for _, r := range call(t, c.ListAudit, q).Records {
			numbers = append(numbers, r.Number)
		}
		return numbers
	}
	for _, tt := range []struct {
		q    *v1.ListAuditRequest
		want []uint64
	}{
		{&v1.ListAuditRequest{After: n - 2}, []uint64{n - 1, n}},
		{&v1.ListAuditRequest{After: 2, Limit: 2}, []uint64{3, 4}},
		{&v1.ListAuditRequest{Limit: 2, Newest: true}, []uint64{n - 1, n}},
		{&v1.ListAuditRequest{After: n}, nil},
		{&v1.ListAuditRequest{After: 1<<64 - 1}, nil},
	} {
		if got := numbers(tt.q); !slices.Equal(got, tt.want) {
			t.Errorf("%v: got %v", tt.q, got)
		}
	}
	refused(t, c.ListAudit, &v1.ListAuditRequest{Limit: maxAuditRecords + 1}, connect.CodeInvalidArgument, "limit is 1001")
}

// Each refusal is in the log, and no credential with it.
func TestRefusalsAreRecorded(t *testing.T) {
	w := start(t)
	w.join(t, "dev")
	refused(t, w.objects("wrong-token").Apply, &v1.ApplyRequest{}, connect.CodeUnauthenticated, "")
	refused(t, w.objects("").Apply, &v1.ApplyRequest{}, connect.CodeUnauthenticated, "")
	refused(t, w.objects(viewer).Apply, &v1.ApplyRequest{}, connect.CodePermissionDenied, "")
	refused(t, w.devices(operator).RemoveDevice, &v1.RemoveDeviceRequest{Device: "dev"}, connect.CodePermissionDenied, "")
	_, csr := pkitest.Request(t, "cam-1")
	for range 3 {
		refused(t, w.enrollment("").Join, &v1.JoinRequest{JoinToken: "wrong-join-token", Name: "cam-1", Csr: csr}, connect.CodePermissionDenied, "")
	}
	refused(t, w.enrollment("").Join, &v1.JoinRequest{Name: "bad name"}, connect.CodeInvalidArgument, "") // not for who it is
	stream, err := v1connect.NewRolloutServiceClient(w.client, w.url).WatchRollout(t.Context(), connect.NewRequest(&v1.WatchRolloutRequest{}))
	must(t, err)
	if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodeUnauthenticated {
		t.Errorf("got %v", stream.Err())
	}
	must(t, stream.Close())
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+v1connect.ModelServiceListModelsProcedure, strings.NewReader("{}"))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(pkitest.AsDevice, "dev")
	resp, err := w.client.Do(req)
	must(t, err)
	must(t, resp.Body.Close())

	before := w.audit(t, 100)
	w.flush(t)
	after := w.audit(t, 100)[len(before):]
	var got []string
	for _, r := range after {
		got = append(got, fmt.Sprintf("%s %s %s x%d", r.Who, r.Action, r.Object, r.Count))
		if !r.Refused || r.Reason == "" || !strings.HasPrefix(r.From, "127.0.0.1:") {
			t.Errorf("got %v", r)
		}
		for _, s := range []string{"wrong-token", "wrong-join-token", viewer, operator} {
			if strings.Contains(r.String(), s) {
				t.Errorf("%s is in %v", s, r)
			}
		}
	}
	want := []string{
		"nobody call.refused " + v1connect.ObjectServiceApplyProcedure + " x2",
		"user:viewer call.refused " + v1connect.ObjectServiceApplyProcedure + " x1",
		"user:operator call.refused " + v1connect.DeviceServiceRemoveDeviceProcedure + " x1",
		"nobody device.join device/cam-1 x3",
		"nobody call.refused " + v1connect.RolloutServiceWatchRolloutProcedure + " x1",
		"device:dev call.refused " + v1connect.ModelServiceListModelsProcedure + " x1",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
