package report

import (
	"context"
	"encoding/base64"
	"encoding/json"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
)

// ResponseKey is the exporter response under which clients find the Report, as
// JSON in base64 like BuildKit's own structured values.
const ResponseKey = "lazy.report"

// UnaryInterceptor accounts for every Solve call and puts the Report into its
// exporter response.
func (r *Reporter) UnaryInterceptor() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		solve, ok := req.(*controlapi.SolveRequest)
		if !ok || info.FullMethod != controlapi.Control_Solve_FullMethodName {
			return handler(ctx, req)
		}
		account := r.Begin(solve.Session)
		resp, err := handler(ctx, req)
		rep, used := r.End(account)
		out, ok := resp.(*controlapi.SolveResponse)
		if err != nil || !used || !ok {
			return resp, err
		}
		dt, merr := json.Marshal(rep)
		if merr != nil {
			return resp, merr
		}
		if out.ExporterResponse == nil {
			out.ExporterResponse = map[string]string{}
		}
		out.ExporterResponse[ResponseKey] = base64.StdEncoding.EncodeToString(dt)
		return out, nil
	}
}
