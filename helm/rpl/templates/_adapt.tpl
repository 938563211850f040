{{/*
The objects of argo/*.yaml, adapted to the values in place: (dict "root" $ "object" OBJECT).

What is set here is set nowhere in argo/ or has the same default there; a test compares.
*/}}
{{- define "rpl.adapt" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $object := .object }}
{{- $component := index $object.metadata.labels "app.kubernetes.io/component" }}
{{- $labels := include "rpl.labels" (dict "root" $root "component" $component) | fromYaml }}
{{- $_ := set $object.metadata "labels" (merge $labels $object.metadata.labels) }}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace }}
{{- with $object.spec.workflowMetadata }}
  {{- $_ := set . "labels" (merge (omit $labels "app.kubernetes.io/component") .labels) }}
{{- end }}
{{- if eq $object.kind "WorkflowTemplate" }}
  {{- with $values.images.pullSecrets }}
    {{- $_ := set $object.spec "imagePullSecrets" . }}
  {{- end }}
{{- end }}
{{- range $key := list "parallelism" "activeDeadlineSeconds" }}
  {{- if hasKey $object.spec $key }}
    {{- $_ := set $object.spec $key (index $values.workflow $key) }}
  {{- end }}
{{- end }}
{{- with $object.spec.ttlStrategy }}
  {{- $_ := set . "secondsAfterCompletion" $values.workflow.ttlSecondsAfterCompletion }}
{{- end }}
{{- range $template := $object.spec.templates }}
  {{- if $template.container }}
    {{- include "rpl.adaptPod" (dict "values" $values "labels" $labels "template" $template) }}
  {{- end }}
{{- end }}
{{- end }}

{{/* One template with a container: (dict "values" VALUES "labels" LABELS "template" TEMPLATE). */}}
{{- define "rpl.adaptPod" -}}
{{- $values := .values }}
{{- $template := .template }}
{{- $container := .template.container }}
{{- $_ := set $template.metadata "labels" (merge (deepCopy .labels) $template.metadata.labels $values.podLabels) }}
{{- with $values.podAnnotations }}
  {{- $_ := set $template.metadata "annotations" (merge $template.metadata.annotations .) }}
{{- end }}
{{- with $values.priorityClassName }}
  {{- $_ := set $template "priorityClassName" . }}
{{- end }}
{{- $_ := set $template.retryStrategy "limit" (toString (int $values.workflow.retryLimit)) }}
{{- if not (contains "workflow.parameters.gpus" $template.podSpecPatch) }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
    {{- with index $values $key }}
      {{- $_ := set $template $key . }}
    {{- end }}
  {{- end }}
{{- end }}
{{- $_ := set $container "imagePullPolicy" $values.images.pullPolicy }}
{{- with index $values.resources $template.name }}
  {{- $_ := set $container "resources" (mergeOverwrite $container.resources (deepCopy .)) }}
{{- end }}
{{- $sources := list }}
{{- range $source := $container.envFrom }}
  {{- if not $source.secretRef }}
    {{- $sources = append $sources $source }}
  {{- else if $values.s3.existingSecret }}
    {{- $sources = append $sources (dict "secretRef" (merge (dict "name" $values.s3.existingSecret) $source.secretRef)) }}
  {{- end }}
{{- end }}
{{- $_ := set $container "envFrom" (concat $sources $values.extraEnvFrom) }}
{{- $_ := set $container "env" (concat $container.env $values.extraEnv) }}
{{- end }}
