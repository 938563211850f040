{{/* What stops an installation: one sentence each, saying what is missing and what to set. */}}
{{- define "rpl.checks" -}}
{{- with .Values }}
{{- if and .checkCrds (not ($.Capabilities.APIVersions.Has "argoproj.io/v1alpha1/WorkflowTemplate")) }}
  {{- fail "the cluster has no WorkflowTemplates; install Argo Workflows 3.6 or newer (`helm template` without a cluster: --set checkCrds=false)." }}
{{- end }}
{{- if and .checkCrds .metrics.serviceMonitor.enabled (not ($.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/ServiceMonitor")) }}
  {{- fail "metrics.serviceMonitor.enabled is set, but the cluster has no ServiceMonitors; install the Prometheus Operator, or switch it off." }}
{{- end }}
{{- if and .checkCrds .metrics.alerts.enabled (not ($.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PrometheusRule")) }}
  {{- fail "metrics.alerts.enabled is set, but the cluster has no PrometheusRules; install the Prometheus Operator, or switch it off." }}
{{- end }}
{{- if not .images.registry }}
  {{- fail "images.registry is empty; set it to where the images of images/Dockerfile were pushed, e.g. ghcr.io/OWNER." }}
{{- end }}
{{- range $name := list "light" "clip" }}
  {{- if not (index $.Values.images $name).repository }}
    {{- fail (printf "images.%s.repository is empty; set it to the name of the image's target %s in the registry." $name $name) }}
  {{- end }}
{{- end }}
{{- if not (regexMatch "^s3://[A-Za-z0-9][A-Za-z0-9._-]{2,}(/[^/]+)*/?$" .s3.runs) }}
  {{- fail (printf "s3.runs is %q; set it to where runs shall live, s3://BUCKET/PREFIX." .s3.runs) }}
{{- end }}
{{- if and .config (not (hasPrefix "s3://" .config)) }}
  {{- fail (printf "config is %q; pods read s3:// alone, so upload the file and set its URI." .config) }}
{{- end }}
{{- if and .schedule.enabled (not .schedule.base) }}
  {{- fail "schedule.enabled is set, but schedule.base is empty; set it to the name of the run whose prompts are used." }}
{{- end }}
{{- if and .networkPolicy.enabled (not .networkPolicy.api.to) }}
  {{- fail "networkPolicy.enabled is set, but networkPolicy.api.to is empty; set it to the API server's addresses (kubectl get endpointslices -n default kubernetes), or no run can report." }}
{{- end }}
{{- if and .networkPolicy.enabled (not .networkPolicy.dns.to) }}
  {{- fail "networkPolicy.enabled is set, but networkPolicy.dns.to is empty; set it to the peers that answer DNS." }}
{{- end }}
{{- if and .networkPolicy.enabled .metrics.pushgateway (not .networkPolicy.pushgateway.to) }}
  {{- fail "networkPolicy.enabled and metrics.pushgateway are set, but networkPolicy.pushgateway.to is empty; set it to the gateway's peers." }}
{{- end }}
{{- if and .metrics.serviceMonitor.enabled (not .metrics.pushgateway) }}
  {{- fail "metrics.serviceMonitor.enabled is set, but metrics.pushgateway is empty, so nothing would be pushed; set its URL." }}
{{- end }}
{{- end }}
{{- end }}
