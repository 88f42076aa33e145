package api

import (
	"context"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/controller/fleet"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/controller/store"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

func (s *server) ListObjects(ctx context.Context, req *connect.Request[v1.ListObjectsRequest]) (*connect.Response[v1.ListObjectsResponse], error) {
	if k := req.Msg.GetKind(); !slices.Contains(fleet.Kinds, k) {
		return nil, invalid("kind %q is none of %s", k, strings.Join(fleet.Kinds, ", "))
	}
	objects, err := s.Store.Objects(ctx, req.Msg.GetKind())
	if err != nil {
		return nil, err
	}
	p := identity.FromContext(ctx)
	objects = slices.DeleteFunc(objects, func(o store.StoredObject) bool {
		selector, selects := o.Selector()
		if !selects {
			return false
		}
		_, ok := p.Narrow(selector)
		return !ok
	})
	return connect.NewResponse(&v1.ListObjectsResponse{Objects: convert(objects, object)}), nil
}

func object(o store.StoredObject) *v1.Object {
	selector, _ := o.Selector()
	m := &v1.Object{Kind: o.Kind(), Name: o.Name(), UpdatedAt: timestamp(o.UpdatedAt), Yaml: o.YAML(), Selector: selector}
	if f := o.Freeze; f != nil {
		m.Reason, m.Until = f.Reason, timestamp(f.Until)
	}
	if w := o.Maintenance; w != nil {
		for _, window := range w.Windows {
			m.Windows = append(m.Windows, fleet.FormatWindow(window))
		}
		m.Timezone = w.TimeZone
	}
	return m
}
